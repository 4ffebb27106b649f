"""When artifacts appear: the diagnoses that training runs recorded, read back as plain data (paper, Fig. 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vitreg.artifacts.outliers import onset
from vitreg.common.words import percent

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""Of the patch norms, for every diagnosis and block."""


def read_timeline(folders: Sequence[Path]) -> dict[str, Any]:
    """Read the diagnoses of training runs; `docs/training.md` describes the keys of what is returned.

    Runs of one depth are shown at one block, so that they can be compared: the one that the latest diagnosis with
    artifacts reports, of the first run that has any; the last block where no run has.

    Args:
        folders: run folders, finished or not.

    Returns:
        JSON types, format `vitreg-timeline/1`.

    Raises:
        ValueError: no folder, a folder twice, one that is no run's, or a run that was not diagnosed yet.
    """
    folders = [Path(folder).expanduser() for folder in folders]
    places = [folder.resolve() for folder in folders]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"runs {' '.join(map(str, folders)) or '(none)'}: give at least one run folder, and each once")
    read = [(_read_config(folder), _read_diagnoses(folder)) for folder in folders]
    depths = [len(diagnoses[-1]["blocks"]) for _, diagnoses in read]
    shown: dict[int, int] = {}
    for depth, (_, diagnoses) in zip(depths, read, strict=True):
        if with_artifacts := [diagnosis for diagnosis in diagnoses if diagnosis["has_artifacts"]]:
            shown.setdefault(depth, with_artifacts[-1]["block"])
    runs = [
        _run(name, folder, config, diagnoses, block=shown.get(depth, depth - 1))
        for name, folder, depth, (config, diagnoses) in zip(_names(places), folders, depths, read, strict=True)
    ]
    return {
        "format": "vitreg-timeline/1",
        "version": metadata.version("vitreg"),
        "quantiles": list(QUANTILES),
        "runs": runs,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    advice = "give folders that `vitreg train` wrote"
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; {advice}")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no run: it has no config.json; {advice}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "vitreg-run/1":
        raise ValueError(f"{path} is not of a training run (format vitreg-run/1); {advice}")
    return config


def _read_diagnoses(folder: Path) -> list[dict[str, Any]]:
    """By step; of a step that a resumed run passed twice, the later one."""
    path = folder / "diagnosis.jsonl"
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            diagnosis = json.loads(line)
        except ValueError:
            continue  # a run that was killed while it wrote leaves half a line, after which a resumed one goes on
        if not isinstance(diagnosis, dict) or diagnosis.get("format") != "vitreg-diagnosis/1":
            raise ValueError(f"{path} holds a line that is no diagnosis (format vitreg-diagnosis/1); give another run")
        by_step[diagnosis["step"]] = diagnosis
    if not by_step:
        raise ValueError(f"{folder} has no diagnosis yet; wait for the run's first one, or for its end")
    return [by_step[step] for step in sorted(by_step)]


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' last parts, as many as tell them apart."""
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def _run(
    name: str, folder: Path, config: Mapping[str, Any], diagnoses: Sequence[Mapping[str, Any]], block: int
) -> dict[str, Any]:
    last = diagnoses[-1]
    # One diagnosis may err, a trend that reaches the end does not.
    first = onset([bool(diagnosis["has_artifacts"]) for diagnosis in diagnoses], len(diagnoses) - 1)
    return {
        "name": name,
        "folder": str(folder),
        "recipe": config["recipe"],
        "num_steps": config["num_steps"],
        "batch_size": config["batch_size"],
        "model": {
            key: last["model"][key] for key in ("parameters", "depth", "embed_dim", "patch_size", "num_registers")
        },
        "block": block,
        "has_artifacts": last["has_artifacts"],
        "first_step": None if first is None else diagnoses[first]["step"],
        "onset_block": last["onset_block"],
        "outlier_fraction": last["outlier_fraction"],
        "verdict": _verdict(config["num_steps"], diagnoses, first),
        "diagnoses": [
            {
                **{key: diagnosis[key] for key in ("step", "images", "metrics", "has_artifacts", "onset_block")},
                "blocks": [
                    _block(diagnosis, number, whole=diagnosis is last or number == block)
                    for number in range(len(diagnosis["blocks"]))
                ],
            }
            for diagnosis in diagnoses
        ],
    }


def _block(diagnosis: Mapping[str, Any], number: int, *, whole: bool) -> dict[str, Any]:
    """One block of one diagnosis; histograms, which are large, only of what is drawn."""
    block, registers = diagnosis["blocks"][number], diagnosis["register_norms"]
    below = np.concatenate([[0], np.cumsum(block["histogram"]["counts"])])
    # Interpolated inside the bins, which are 6 % wide.
    norms = np.exp(np.interp(np.array(QUANTILES) * below[-1], below, np.log(block["histogram"]["edges"])))
    return {
        "quantiles": np.minimum(norms, block["max"]).round(4).tolist(),
        "max": block["max"],
        "threshold": block["threshold"],
        "outlier_fraction": block["outlier_fraction"],
        "register_norms": None if registers is None else registers[number],
        "histogram": block["histogram"] if whole else None,
    }


def _verdict(num_steps: int, diagnoses: Sequence[Mapping[str, Any]], first: int | None) -> str:
    last = diagnoses[-1]
    so_far = f"; so far {last['step']} of {num_steps} steps" if last["step"] < num_steps else ""
    found = [diagnosis["step"] for diagnosis in diagnoses if diagnosis["has_artifacts"]]
    unknown = sum(diagnosis["has_artifacts"] is None for diagnosis in diagnoses)
    num = f"{len(diagnoses)} diagnos{'is' if len(diagnoses) == 1 else 'es'}"
    if first is not None:
        inside = last["block"] < len(last["blocks"]) - 1
        where = f"inside at block {last['block']}" if inside else f"block {last['onset_block']} on"
        when = f"from step {diagnoses[first]['step']}" if first else f"from the first diagnosis (step {found[0]})"
        return f"artifacts {when}, {where}: {percent(last['outlier_fraction'])} of patches{so_far}"
    if found:
        end = "too few patches to tell" if last["has_artifacts"] is None else "none"
        return f"artifacts in {len(found)} of {num}, the last at step {found[-1]}, {end} at the end{so_far}"
    return f"no artifacts in {num}{f', too few patches to tell in {unknown} of them' if unknown else ''}{so_far}"
