"""Comparisons made of plain arrays."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from report.diagnoses import THRESHOLD, make_examples, make_summary
from vitreg.report import ExampleMaps


def make_pair(
    before: Sequence[str] = ("class token",), after: Sequence[str] = ("class token",), **shape: object
) -> tuple[list[ExampleMaps], list[ExampleMaps]]:
    """The examples of `make_examples`, and the same images without outliers and with other maps."""
    old, new = make_examples(queries=tuple(before), **shape), make_examples(queries=tuple(after), **shape)
    for example in new:
        example.norms[example.norms >= THRESHOLD] = 14
        example.norms[...] *= 1.05
        for maps in example.attention.values():
            maps[...] = maps[..., ::-1] / 2
    return old, new


def make_comparison(
    before: Sequence[ExampleMaps],
    after: Sequence[ExampleMaps],
    *,
    outcome: str = "removed",
    registers_after: int = 0,
    threshold: float | None = THRESHOLD,
) -> dict:
    """What a comparison says of these examples, the second model having been given registers."""
    old, new = (make_summary(list(examples), threshold=threshold) for examples in (before, after))
    depth = len(old["blocks"])
    new["model"] |= {"name": "vit_test_fixed", "num_registers": registers_after}
    if registers_after:
        new["register_norms"] = [[30.0 + k + r for r in range(registers_after)] for k in range(depth)]
    for summary in (old, new):
        summary["cls_norms"] = [10.0] * depth if before[0].attention else None
    blocks = []
    for was, now, norms in zip(old["blocks"], new["blocks"], np.stack([e.norms for e in after], axis=1), strict=True):
        block = {"block": was["block"], "threshold": was["threshold"]}
        for key in ("outlier_fraction", "max", "median", "p99", "attention_on_outliers", "attention_on_registers"):
            block |= {f"{key}_before": was[key], f"{key}_after": now[key]}
        block["outlier_fraction_after"] = float((norms >= (was["threshold"] or np.inf)).mean())
        if registers_after and before[0].attention:
            block |= {"attention_on_registers_before": 0.0, "attention_on_registers_after": 0.4}
        blocks.append(block)
    return {
        "format": "vitreg-comparison/1",
        "version": "0.1.0",
        "before": old,
        "after": new,
        "block": old["block"],
        "outcome": outcome,
        "blocks": blocks,
        "patch_similarity": 0.98765,
        "cls_similarity": 0.99876,
        "head_agreement": 0.5,
        "head_similarity": 0.91234,
        "grid": old["grid"],
        "image_size": old["image_size"],
        "num_images": old["num_images"],
        "skipped": [],
        "interrupted": False,
        "seconds": 3.5,
        "verdict": ["Outliers were planted before, and are gone after: see `comparisons.py`."],
    }


def renamed(examples: Sequence[ExampleMaps], name: str) -> list[ExampleMaps]:
    return [dataclasses.replace(example, name=name) for example in examples]
