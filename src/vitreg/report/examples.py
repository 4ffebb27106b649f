"""What the report and the figures draw of one image."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True)
class ExampleMaps:
    """The maps of one image: L blocks, h x w patches, R registers.

    Attributes:
        name: What to call the image, usually its file name.
        photo: What the model saw, not normalized; the h x w patches tile it.
        norms: L2 norm of every patch token after each block, before the final norm.
        attention: The attention each patch receives, mean over heads, after each block; keyed by who attends
            ("class token", "register 1", ...). Empty for a model with neither class token nor registers.
        register_norms: L2 norm of every register after each block, None without registers.
        cls_norms: L2 norm of the class token after each block, None without a class token.
    """

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    norms: Float[np.ndarray, "L h w"]
    attention: dict[str, Float[np.ndarray, "L h w"]] = field(default_factory=dict)
    register_norms: Float[np.ndarray, "L R"] | None = None
    cls_norms: Float[np.ndarray, " L"] | None = None


def check_examples(summary: dict, examples: Sequence[ExampleMaps]) -> None:
    """Raise `ValueError` unless every example fits the summary, and so every other example.

    One slider and one color scale serve all images, so they must agree on blocks, grid and who attends, and
    a single NaN would take the scale of every image with it.
    """
    shape = (len(summary["blocks"]), *summary["grid"])
    for example in examples:
        if example.photo.dtype != np.uint8 or example.photo.ndim != 3 or example.photo.shape[2] != 3:
            raise ValueError(
                f"{example.name}: photo is {example.photo.dtype} {list(example.photo.shape)}, expected uint8 "
                "[H, W, 3]; undo the model's normalization first."
            )
        if example.attention.keys() != examples[0].attention.keys():
            raise ValueError(
                f"{example.name}: attention is from {list(example.attention)}, but that of "
                f"{examples[0].name} is from {list(examples[0].attention)}; record the same for all."
            )
        for what, values in {"norms": example.norms, **example.attention}.items():
            if values.shape != shape:
                raise ValueError(
                    f"{example.name}: {what} has shape {list(values.shape)}, but the summary has {shape[0]} "
                    f"blocks of {shape[1]} x {shape[2]} patches."
                )
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{example.name}: {what} holds NaN or infinity; run the model in float32 or bfloat16, "
                    "float16 overflows in some Vision Transformers."
                )


def check_pairs(summary: dict, before: Sequence[ExampleMaps], after: Sequence[ExampleMaps]) -> None:
    """Raise `ValueError` unless both models' examples fit the summary and show the same images in the same order."""
    for which, examples in (("before", before), ("after", after)):
        blocks, grid = len(summary[which]["blocks"]), summary[which]["grid"]
        if blocks != len(summary["blocks"]) or list(grid) != list(summary["grid"]):
            raise ValueError(
                f"{which}: the diagnosis has {blocks} blocks of {grid[0]} x {grid[1]} patches, but the comparison "
                f"{len(summary['blocks'])} of {summary['grid'][0]} x {summary['grid'][1]}; compare models of one depth "
                "and grid."
            )
        try:
            check_examples(summary, examples)
        except ValueError as error:
            raise ValueError(f"{which}: {error}") from None
    if len(before) != len(after):
        raise ValueError(f"{len(before)} examples before and {len(after)} after; give both models the same images.")
    for old, new in zip(before, after, strict=True):
        if old.name != new.name or old.photo.shape != new.photo.shape:
            raise ValueError(
                f"{old.name} of {_size(old)} pixels before, but {new.name} of {_size(new)} after; give both models the "
                "same images in the same order and size."
            )


def _size(example: ExampleMaps) -> str:
    return " x ".join(map(str, example.photo.shape[:2]))
