"""The number of registers (Fig. 8): artifacts, attention on registers, k-NN and CorLoc in one figure.

    python benchmarks/evidence.py PHOTOGRAPHS --models NONE ONE TWO ... --json found.json
    vitreg evaluate knn --data DATA --models NONE ONE TWO ... --out probes
    vitreg evaluate discovery --data yolo:COCO128 --models NONE ONE TWO ... --out discovery
    python benchmarks/number_of_registers.py 0 1 2 ... --found found.json --probes probes --discovery discovery \\
        --out FILE.png

The models of all three are in the order of the numbers. Bars are 95 % intervals.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def points(rows: list[dict]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals go below and above."""
    values = [row["value"] for row in rows]
    bars = [[row["value"] - row["interval"][0] for row in rows], [row["interval"][1] - row["value"] for row in rows]]
    return values, bars


def top_1(folder: Path) -> list[dict]:
    """Of k-NN with 20 neighbors, for each model."""
    models = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["models"]
    return [next(s for s in model["probes"]["knn"]["scores"] if s["subject"] == "k = 20") for model in models]


def corloc(folder: Path) -> list[dict]:
    models = json.loads((folder / "discovery.json").read_text(encoding="utf-8"))["models"]
    return [{"value": model["protocol"]["corloc"], "interval": model["protocol"]["interval"]} for model in models]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="+", help="what stands below each model")
    for name in ("found", "probes", "discovery", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    found = list(json.loads(options.found.read_text(encoding="utf-8"))["models"].values())
    last = max(int(name.split()[3].strip(",")) for name in found[0] if name.startswith("outliers after block"))
    none = {"value": 0.0, "interval": [0.0, 0.0]}
    attention = f"class token's attention on {{}} in block {last}, %"
    panels = {
        "outliers after the last block (% of patches)": [
            ("", [model.get(f"outliers after block {last}, %", none) for model in found])
        ],
        "class token's attention, last block (%)": [
            (f"on {what}", [model.get(attention.format(what), none) for model in found])
            for what in ("outliers", "registers")
        ],
        "k-NN, top-1 (%)": [("", top_1(options.probes))],
        "LOST, CorLoc (%)": [("", corloc(options.discovery))],
    }
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, rows in lines:
            values, bars = points(rows)
            axes.errorbar(range(len(rows)), values, yerr=bars, fmt="o-", capsize=3, label=label)
        if lines[0][0]:
            axes.legend(fontsize=8)
        axes.set_xticks(range(len(options.counts)), options.counts)
        axes.set_xlabel("registers")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(options.out, dpi=110)
