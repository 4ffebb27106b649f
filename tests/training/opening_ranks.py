"""Opening tars in several processes; its own file, because processes import what they run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vitreg.images import tars
from vitreg.training import open_data
from vitreg.training.engine.distributed import Distributed


def run(rank: int, world: int, port: int, archive: Path, folder: Path) -> None:
    """Each process writes down how often it scanned an archive, and the name and size of every image."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    scan, scans = tars.tar_members, []

    def counting(path: Path) -> Any:
        scans.append(path)
        return scan(path)

    tars.tar_members = counting
    images = open_data(archive, device="cpu").images
    found = [f"{images.name(i)} {images.image(i).size} {images.labels[i]}" for i in range(len(images))]
    (folder / f"{rank}.txt").write_text("\n".join([str(len(scans)), *found]))
    Distributed.join("cpu").leave()
