"""What a feature store says of itself: of what it is, and, once it is finished, what was found."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitreg.artifacts import OutlierNorms
from vitreg.common.disk import write_json
from vitreg.probes.store.origin import Origin
from vitreg.probes.store.shards import FORMAT


@dataclass(frozen=True)
class StoreStatistics:
    """What is known after the last image.

    Attributes:
        grid: rows and columns of patches.
        depth: blocks of the model.
        outliers: where artifacts' norms begin.
        shards: the files, in the order of the images, and how many rows each has.
        num_images: those that could be read.
    """

    grid: tuple[int, int]
    depth: int
    outliers: OutlierNorms
    shards: dict[str, int]
    num_images: int


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`.

    Attributes:
        origin: what the features are of.
        id: a digest of it.
        classes: names of the classes, none where there are no labels.
        model: what a diagnosis says of the model.
        num_shards: files of a finished store.
        finding: None while shards are missing.
    """

    origin: Origin
    id: str
    classes: tuple[str, ...]
    model: dict[str, Any]
    num_shards: int
    finding: StoreStatistics | None = None

    def write(self, folder: Path) -> None:
        """Write it, in place of an earlier one; a `ValueError` where there is no room."""
        write_json(folder / "manifest.json", {"format": FORMAT, **dataclasses.asdict(self)})


def read_manifest(folder: Path) -> Manifest | None:
    """A folder's manifest; None where there is none.

    Raises:
        ValueError: it is damaged, or of something else than a feature store.
    """
    path = folder / "manifest.json"
    again = f"delete {folder} and run the feature pass again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {again}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a feature store (format {FORMAT}); give the folder of a feature pass")
    try:
        finding = values["finding"]
        if finding is not None:
            rows, columns = finding["grid"]
            outliers = OutlierNorms(**finding["outliers"])
            finding = StoreStatistics(**finding | {"grid": (rows, columns), "outliers": outliers})
        origin, classes = Origin.from_dict(values["origin"]), tuple(values["classes"])
        return Manifest(origin, values["id"], classes, values["model"], values["num_shards"], finding)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); {again}") from error
