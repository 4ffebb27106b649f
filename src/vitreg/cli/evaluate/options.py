"""Options that the `vitreg evaluate` commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitreg.cli.options import Batching, Runtime, Size, positive, sides

if TYPE_CHECKING:
    from vitreg.probes.catalogue import EvalData

VARIANTS = {"linear": "segmentation", "+ms": "segmentation-ms", "lin.1": "depth", "lin.4": "depth-lin4"}
"""Probes by what `--variant` calls them."""


@dataclass(frozen=True)
class EvaluationData:
    """What probes are asked on.

    Attributes:
        data: images, as for evaluate knn; without labels only position and reconstruction are asked.
        class_names: as for evaluate zero-shot.
        segmentation: as --data of evaluate segmentation.
        segmentation_size: as --size, which is for all, but for segmentation only.
        segmentation_ignore: as its --ignore.
        segmentation_variants: as its --variant; several make a column each.
        depth: as --data of evaluate depth.
        depth_size: as --size, but for depth only.
        depth_scale: as its --scale.
        depth_variants: as its --variant.
        discovery: as --data of evaluate discovery.
    """

    data: str | None = None
    class_names: Path | None = None
    segmentation: str | None = None
    segmentation_size: Size | None = None
    segmentation_ignore: int | None = None
    segmentation_variants: tuple[Literal["linear", "+ms"], ...] = ("linear",)
    depth: str | None = None
    depth_size: Size | None = None
    depth_scale: float = 0.001
    depth_variants: tuple[Literal["lin.1", "lin.4"], ...] = ("lin.1",)
    discovery: str | None = None

    def opened(self) -> list[EvalData]:
        """What there is, but boxes."""
        from vitreg.images import open_depth, open_segmentation, open_split
        from vitreg.probes.catalogue import EvalData
        from vitreg.probes.choosing import hold_out

        found: list[EvalData] = []
        if self.data:
            train, val = open_split(self.data)
            if val is None:
                train, val = hold_out(train)
            found.append(EvalData("classification", train, val, class_names=self._names()))
        if self.segmentation:
            sets = open_segmentation(self.segmentation, ignore=self.segmentation_ignore)
            found.append(EvalData("segmentation", *sets, both_sides(self.segmentation_size)))
        if self.depth:
            sets = open_depth(self.depth, scale=self.depth_scale)
            found.append(EvalData("depth", *sets, both_sides(self.depth_size)))
        if not found and not self.discovery:
            raise ValueError("there is nothing to evaluate on; give --data, --segmentation, --depth or --discovery")
        return found

    def _names(self) -> tuple[str, ...] | None:
        if self.class_names is None:
            return None
        try:
            lines = self.class_names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {self.class_names}: {error}; give a text file with a name a line") from error
        return tuple(line.strip() for line in lines if line.strip())


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Batching, Runtime):
    """Models and images.

    Attributes:
        models: names or files, as for --model; one with registers is compared with the nearest one before it that has
            fewer.
        out: folder for results and features; the same command goes on with what is in it.
        limit: so many training images and so many validation images only, from all over the files and classes.
        train_images: so many training images.
        val_images: so many validation images.
        size: side of what the models see in pixels, or height and width, rounded to whole patches; by default the
            protocol's: 224, 512 and 480 for the short side of segmentation and depth, zero-shot the checkpoint's own.
        quick: cut the protocols to the data at hand (fewer steps, draws and sentences); such figures are called quick.
        patch_images: keep the patch tokens of so many images (5 GB for a ViT-L/14); segmentation and depth keep all.
        batch_size: images at a time, when features are computed.
        json: print evaluation.json.
    """

    models: tuple[str, ...]
    out: Path = Path("vitreg-out/evaluate")
    train_images: int | None = None
    val_images: int | None = None
    size: Size | None = None
    quick: bool = False
    patch_images: int = 10000
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_models(self.models)
        for flag in ("train_images", "val_images", "patch_images"):
            if (value := getattr(self, flag)) is not None:
                positive(f"--{flag.replace('_', '-')}", value)
        both_sides(self.size)


def check_models(models: tuple[str, ...]) -> None:
    """Refuse `--models` that name none, or one twice."""
    if not models or len(set(models)) < len(models):
        raise ValueError(f"--models {' '.join(models) or 'is empty'}: name at least one model, and each once")


def both_sides(size: Size | None) -> tuple[int, int] | None:
    """Height and width, where a size is given."""
    return None if size is None else sides(size)
