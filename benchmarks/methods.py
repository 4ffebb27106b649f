"""All methods of `vitreg fix` against the model as it was: what probes and discovery say, and the cost of a pass.

    vitreg evaluate knn --data DATA --models MODEL FIXED ... --out probes      (and other probes into the same folder)
    vitreg evaluate discovery --data yolo:COCO128 --models MODEL FIXED ... --out discovery
    python benchmarks/methods.py MODEL FIXED ... --probes probes --discovery discovery

A row for each model, a column for each probe that was asked: the figure with its 95 % bootstrap interval, and the
paired difference to the first model. Times are of batches of 8, the models in turn, medians of their ratios.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import vitreg
from vitreg.common.words import safe_name
from vitreg.probes.results.result_cache import read_answer
from vitreg.probes.results.score import Score

PROBES = {"knn": "k-NN, k = 20, %", "linear": "linear, %", "segmentation": "mIoU, %", "depth": "RMSE, m"}


def score(folder: Path, model: str, probe: str) -> Score | None:
    """The figure that is shown of a probe, by the protocol or else a quick one."""
    for form in (probe, f"{probe}-quick"):
        path = folder / "answers" / f"{safe_name(model)}-{form}.safetensors"
        if path.is_file():
            scores = read_answer(path).result.scores
            return next((one for one in scores if one.subject == "k = 20"), scores[0])
    return None


def told(value: float, interval: tuple[float, float], sign: str = "") -> str:
    digits = 1 if abs(value) > 10 or sign == "%" else 3
    return f"{value:{'+' if sign else ''}.{digits}f} [{', '.join(f'{end:.{digits}f}' for end in interval)}]"


def cell(own: Score | None, first: Score | None) -> str:
    if own is None or first is None:
        return "–"
    difference = None if own is first else own.minus(first)
    text = told(own.value, own.interval())
    return text if difference is None else f"{text}; {told(difference.value, difference.interval, own.unit or '+')}"


@torch.inference_mode()
def ratios(models: list[str], repeats: int) -> list[float]:
    """Time of a pass over the first model's."""
    loaded = [vitreg.load(model).float() for model in models]
    images = torch.randn(8, 3, *loaded[0].config.image_size)
    found = []
    for _ in range(repeats):
        seconds = []
        for vit in loaded:
            since = time.perf_counter()
            vit(images)
            seconds.append(time.perf_counter() - since)
        found.append(torch.tensor(seconds) / seconds[0])
    return torch.stack(found[1:]).median(0).values.tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--probes", type=Path)
    parser.add_argument("--discovery", type=Path)
    parser.add_argument("--repeats", type=int, default=0, help="of the times; none by default")
    given = parser.parse_args()
    columns = {}
    for probe, title in PROBES.items() if given.probes else ():
        scores = [score(given.probes, model, probe) for model in given.models]
        columns[title] = [cell(own, scores[0]) for own in scores]
    if given.discovery:
        summary = json.loads((given.discovery / "discovery.json").read_text(encoding="utf-8"))
        values = [model["protocol"] for model in summary["models"]]
        columns["CorLoc, %"] = [told(value["corloc"], value["interval"]) for value in values]
    if given.repeats:
        columns["pass"] = [f"{ratio:.3f}" for ratio in ratios(given.models, given.repeats + 1)]
    print(f"| model | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in zip([Path(model).stem for model in given.models], *columns.values(), strict=True):
        print(f"| {' | '.join(row)} |")
