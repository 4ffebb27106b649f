"""What a feature store says of itself: of what it is, and, once it is finished, what was found."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from vitreg.artifacts import OutlierNorms
from vitreg.common.disk import write_json
from vitreg.probes.store.origin import Origin

FORMAT = "vitreg-features/1"


@dataclass(frozen=True)
class StoreStatistics:
    """What is known after the last image: the grid of patches, the number of blocks, where artifacts' norms begin."""

    grid: tuple[int, int]
    depth: int
    outliers: OutlierNorms


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`.

    Attributes:
        origin: what the features are of.
        id: a digest of it, which the shards carry.
        classes: names of the classes, none where there are no labels.
        finding: None while shards are missing.
    """

    origin: Origin
    id: str
    classes: tuple[str, ...]
    finding: StoreStatistics | None = None

    @property
    def num_shards(self) -> int:
        """Files of a finished store."""
        return -(-self.origin.data.number // self.origin.config.shard_size)

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
            finding = StoreStatistics((rows, columns), finding["depth"], OutlierNorms(**finding["outliers"]))
        return Manifest(Origin.from_dict(values["origin"]), values["id"], tuple(values["classes"]), finding)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); {again}") from error
