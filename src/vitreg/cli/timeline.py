"""`vitreg timeline`: when artifacts appear in training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from vitreg.cli.options import writable_folder
from vitreg.cli.output import print_json
from vitreg.common.disk import write_json

Runs = Annotated[Positional[list[Path]], arg(metavar="RUN")]


def timeline(runs: Runs, *, out: Path = Path("vitreg-out/timeline"), json: bool = False) -> int:
    """Draw when artifacts appear in training runs: norms by block, by step and by model size.

    Reads the diagnoses that the runs recorded, computes nothing anew, and can be asked while they train. Writes
    timeline.png and timeline.json. Runs with and without registers are best drawn together.

    Example: vitreg timeline runs/no-registers runs/four-registers --out timeline

    Args:
        runs: folders of training runs, finished or not.
        out: folder for what is written.
        json: print timeline.json.
    """
    from vitreg.artifacts.timeline import read_timeline
    from vitreg.report import timeline_figure

    found = read_timeline(runs)
    out = writable_folder(out)
    write_json(out / "timeline.json", found)
    timeline_figure(found, out / "timeline.png")
    if json:
        print_json(found)
        return 0
    for run in found["runs"]:
        print(f"{run['name']}: {run['verdict']}")
    print(f"see {out / 'timeline.png'}")
    return 0
