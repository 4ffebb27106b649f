"""How large values become: whether float16 holds them, and what int8 would leave of a token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.checkpoints import ObservedViT
from vitreg.common.words import counted, number, percent
from vitreg.model import Preprocess, Trace, VisionTransformer
from vitreg.model.trace import Summary

FLOAT16_MAX = 65504.0
"""The largest number that half precision holds."""

OVERFLOWED = 65536.0
"""What values count as that are not finite, in a model that runs in half precision."""

INT8_ERROR = 0.1
"""Rounding by int8 changes a token by more than this part of it: more than 20 dB below are not kept."""

SQUARE = 56
"""Pixels to a side of a checkerboard's squares: images so overflow Qwen2.5-VL's vision tower in half precision."""

PLACES = {"stream": "residual stream", "activations": "MLP's hidden units", "mlp": "MLP's output"}
"""The intermediates that are looked at, and what they are called."""


class Range(NamedTuple):
    """How large the values of one tensor become.

    Attributes:
        largest: magnitude, of all images and the probe images.
        image: where it is.
        int8_per_tensor, int8_per_channel: what rounding to int8 would change of a typical token, as a share of its
            norm, with a step of 1/127 of the largest magnitude of the tensor or of each channel; 1 for nothing left.
    """

    largest: float
    image: str
    int8_per_tensor: float
    int8_per_channel: float


@dataclass(frozen=True)
class BlockRanges:
    """The range of the values of one block.

    Attributes:
        block: counted from 0.
        stream: all tokens after the block.
        activations: the MLP's hidden units; None of a model that is observed.
        mlp: the MLP's output, before it is added to the stream; None of a model that is observed.
        sum_of_squares: the largest of a token after the block, which a norm adds up.
    """

    block: int
    stream: Range
    activations: Range | None
    mlp: Range | None
    sum_of_squares: float

    @property
    def largest(self) -> tuple[str, Range]:
        """The place with the largest value, and its range."""
        known = {place: found for place in PLACES if (found := getattr(self, place)) is not None}
        return max(known.items(), key=lambda item: item[1].largest)


@dataclass(frozen=True)
class Ranges:
    """What is known of the range of a model's values.

    Attributes:
        float16: whether half precision holds every value that was seen.
        overflowing: blocks with values that it does not hold.
        probes: names of the images that were looked at beside those that were given.
        blocks: every block's ranges.
    """

    float16: bool
    overflowing: tuple[int, ...]
    probes: tuple[str, ...]
    blocks: tuple[BlockRanges, ...]


def probe_images(preprocess: Preprocess, size: tuple[int, int]) -> tuple[Float[Tensor, "B 3 H W"], list[str]]:
    """Normalized images that drive activations far, and what to call them: a checkerboard, and flat ones."""
    rows, columns = (torch.arange(side)[:, None] // SQUARE for side in size)
    images = {
        "black image": torch.zeros(size),
        "white image": torch.full(size, 255),
        f"checkerboard of {SQUARE} pixels": (rows + columns.T) % 2 * 255,
    }
    pixels = torch.stack([image.to(torch.uint8).expand(3, -1, -1) for image in images.values()])
    return preprocess.normalize(pixels), list(images)


def _extent(x: Float[Tensor, "B T C"], *, signed: bool = True) -> Float[Tensor, " C+2"]:
    """Of each channel the largest magnitude; then the image that has the largest of all, and a typical token's norm."""
    channels = x.amax(0).amax(0)  # over images first, which is vectorized
    if signed:
        channels = torch.maximum(channels, -x.amin(0).amin(0))
    image = x[..., channels.argmax()].abs().amax(1).argmax()
    typical = torch.linalg.vector_norm(x[:, ::8], dim=-1, dtype=torch.float32).median()  # enough tokens for a median
    return torch.cat([channels.float(), torch.stack([image.float(), typical])])


class RangeSums:
    """Adds up ranges over batches."""

    def __init__(self, vit: VisionTransformer | ObservedViT) -> None:
        self.summaries: dict[str, Summary] = {f"range of {place}": (place, _extent) for place in PLACES}
        if isinstance(vit, VisionTransformer) and not vit.config.signed_units:  # the largest is never a negative one
            self.summaries["range of activations"] = ("activations", partial(_extent, signed=False))
        self._probes: list[str] = []
        self._num_images = 0
        self._channels: dict[str, Tensor] = {}
        self._typical: dict[str, Tensor] = {}
        self._largest: dict[str, list[tuple[float, str]]] = {}
        self._squares: Tensor | None = None

    def add(self, trace: Trace, names: list[str], *, probes: bool = False) -> None:
        """Add a batch; probe images say nothing of the steps that int8 would be given."""
        if probes:
            self._probes += names
        else:
            self._num_images += len(names)
        for place in PLACES:
            if (found := trace.summaries.get(f"range of {place}")) is None:
                continue
            found = found.cpu().nan_to_num(nan=OVERFLOWED, posinf=OVERFLOWED)
            channels, images, typical = found[:, :-2], found[:, -2].int().tolist(), found[:, -1]
            seen = [(float(most), names[i]) for most, i in zip(channels.amax(1), images, strict=True)]
            self._largest[place] = [max(pair) for pair in zip(self._largest.get(place, seen), seen, strict=True)]
            if not probes:
                self._channels[place] = torch.maximum(self._channels.get(place, channels), channels)
                self._typical[place] = self._typical.get(place, 0) + typical * len(names)
        norms = [trace.patch_norms.flatten(1), trace.register_norms.flatten(1)]
        norms += [] if trace.cls_norms is None else [trace.cls_norms]
        squares = torch.cat(norms, dim=1).amax(1).cpu().nan_to_num(nan=OVERFLOWED, posinf=OVERFLOWED).double().square()
        self._squares = squares if self._squares is None else torch.maximum(self._squares, squares)

    def conclude(self) -> Ranges:
        """What was seen over at least one batch."""
        assert self._squares is not None
        blocks = tuple(
            BlockRanges(i, **{place: self._range(place, i) for place in PLACES}, sum_of_squares=squares)
            for i, squares in enumerate(self._squares.tolist())
        )
        overflowing = tuple(block.block for block in blocks if block.largest[1].largest > FLOAT16_MAX)
        return Ranges(not overflowing, overflowing, tuple(self._probes), blocks)

    def _range(self, place: str, block: int) -> Any:
        if place not in self._largest:
            return None
        channels = self._channels[place][block].double()
        typical = float(self._typical[place][block]) / self._num_images
        # A value that is rounded to steps of s is wrong by s / sqrt(12) in the mean square.
        steps = {"per_tensor": channels.amax().expand_as(channels) / 127, "per_channel": channels / 127}
        errors = {name: float((step.square().sum() / 12).sqrt()) / (typical or 1.0) for name, step in steps.items()}
        largest, image = self._largest[place][block]
        return Range(largest, image, *(min(error, 1.0) for error in errors.values()))


def say_ranges(ranges: Ranges) -> list[str]:
    """In sentences, the most important first."""
    worst = max(ranges.blocks, key=lambda block: block.largest[1].largest)
    if not ranges.float16:  # later blocks carry on what the first one wrote
        worst = ranges.blocks[ranges.overflowing[0]]
    place, found = worst.largest
    where = f"{number(found.largest)}, in the {PLACES[place]} of block {worst.block} ({found.image})"
    if ranges.float16:
        half = (
            f"float16 holds every value that was seen: the largest is {where}, "
            f"{number(FLOAT16_MAX / (found.largest or 1.0))} times below its limit of {FLOAT16_MAX:.0f}."
        )
    else:
        half = (
            f"float16 overflows at {where}: its limit is {FLOAT16_MAX:.0f}. "
            f"{counted(len(ranges.overflowing), 'block')} of {len(ranges.blocks)} exceed it; use bfloat16 or float32."
        )
    squares = [block.block for block in ranges.blocks if block.sum_of_squares > FLOAT16_MAX]
    if ranges.float16 and squares:
        half += (
            f" An engine that adds up a norm's squares in float16, as PyTorch does not, overflows after block "
            f"{', '.join(map(str, squares))}."
        )
    return [half, _int8(ranges)]


def _int8(ranges: Ranges) -> str:
    errors = {block.block: block.stream.int8_per_tensor for block in ranges.blocks}
    worst = max(errors, key=lambda block: errors[block])
    lost = [str(block) for block, error in errors.items() if error > INT8_ERROR]
    text = (
        f"Rounded to int8 with one step for the residual stream, a typical token after block {worst} changes by "
        f"{percent(errors[worst])}, with a step for each channel by "
        f"{percent(ranges.blocks[worst].stream.int8_per_channel)}"
    )
    return text + (f"; by more than {percent(INT8_ERROR)} after block {', '.join(lost)}." if lost else ".")


def say_ranges_changed(before: Ranges, after: Ranges) -> list[str]:
    """What another model, such as a fixed one, does to the range."""
    worst = max(before.blocks, key=lambda block: block.stream.int8_per_tensor)
    pair = (worst.stream, after.blocks[worst.block].stream)
    largest = (max(block.largest[1].largest for block in ranges.blocks) for ranges in (before, after))
    was, now = map(number, largest)
    errors = [percent(found.int8_per_tensor) for found in pair]
    half = "" if before.float16 == after.float16 else f", which float16 {'holds' if after.float16 else 'does not hold'}"
    return [
        f"The largest value inside the model was {was} and is {now}{half}; rounding the residual stream after block "
        f"{worst.block} to int8 with one step changed a typical token by {errors[0]}, now by {errors[1]}."
    ]
