"""Diagnoses made of plain arrays."""

import numpy as np

from report.pages import EVIL
from vitreg.report import ExampleMaps

THRESHOLD = 100.0


def make_examples(
    count: int = 2,
    depth: int = 4,
    grid: tuple[int, int] = (3, 4),
    queries: tuple[str, ...] = ("class token",),
) -> list[ExampleMaps]:
    """Random maps in which the first patch of every image is an outlier from block 2 on."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        norms = rng.uniform(5, 15, (depth, *grid)).astype(np.float32)
        norms[2:, 0, 0] = 400
        attention = {q: (rng.uniform(0.1, 1, norms.shape) / norms[0].size).astype(np.float32) for q in queries}
        photo = rng.integers(0, 256, (grid[0] * 16, grid[1] * 16, 3), dtype=np.uint8)
        examples.append(ExampleMaps(f"photo {i}.jpg", photo, norms, attention))
    return examples


def make_ranges(depth: int) -> dict:
    """Values that grow from block to block, and overflow in the last."""
    found = [
        {"largest": 8.0 * 10 ** min(k, 4), "image": EVIL, "int8_per_tensor": 0.25, "int8_per_channel": 0.02}
        for k in range(depth)
    ]
    blocks = [
        {"block": k, **dict.fromkeys(("stream", "activations", "mlp"), found[k]), "sum_of_squares": 9.0}
        for k in range(depth)
    ]
    return {"float16": False, "overflowing": [depth - 1], "probes": ["black image"], "blocks": blocks}


def make_faithfulness(depth: int) -> dict:
    found = {"to_patches": 0.5, "to_registers": 0.125, "to_cls": 0.375, "cosine": 0.75}
    return {"blocks": [{"block": k, **found} for k in range(depth)], "sentences": ["Half of it."]}


def make_sinks(depth: int) -> dict:
    """One in the last block."""
    blocks = [{"no-op": int(k == depth - 1), "broadcast": 0, "other": 0} for k in range(depth)]
    head = {"block": depth - 1, "head": 2, "tokens": "registers", "attention": 0.5, "value_norm": 0.1}
    return {
        "num_heads": 4,
        "blocks": blocks,
        "heads": [head | {"stable_rank": 1.5, "kind": "no-op"}],
        "sentences": ["One sink."],
    }


def make_summary(examples: list[ExampleMaps], *, block: int = 3, threshold: float | None = THRESHOLD) -> dict:
    """What `Diagnosis.to_dict()` says of these examples; no outliers where `threshold` is None."""
    norms = np.stack([e.norms for e in examples], axis=1)
    depth, num_images, *grid = norms.shape
    blocks = []
    for k, values in enumerate(norms):
        limit = threshold if threshold is not None and values.max() >= threshold else None
        edges = np.geomspace(values.min() * 0.99, values.max() * 1.01, 21)
        blocks.append(
            {
                "block": k,
                "median": float(np.median(values)),
                "p99": float(np.quantile(values, 0.99)),
                "max": float(values.max()),
                "threshold": limit,
                "outlier_fraction": float((values >= (limit or np.inf)).mean()),
                "attention_on_outliers": 0.25 if examples[0].attention else None,
                "attention_on_registers": None,
                "histogram": {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()},
            }
        )
    reported = blocks[block]
    found = [b["block"] for b in blocks if b["threshold"] is not None]
    outliers = norms[block] >= (reported["threshold"] or np.inf)
    return {
        "format": "vitreg-diagnosis/1",
        "version": "0.1.0",
        "model": {
            "name": "vit_test",
            "family": "test",
            "parameters": 5_717_416,
            "patch_size": 16,
            "num_registers": 0,
            "depth": depth,
            "num_heads": 3,
            "embed_dim": 192,
            "has_class_token": bool(examples[0].attention),
        },
        "image_size": [grid[0] * 16, grid[1] * 16],
        "grid": grid,
        "num_images": num_images,
        "num_patches": num_images * grid[0] * grid[1],
        "has_artifacts": bool(found),
        "status": "artifacts" if found else "clean",
        "undecided": None,
        "outlier_fraction": reported["outlier_fraction"],
        "threshold": reported["threshold"],
        "threshold_rule": f"fixed: norms of {threshold} and more",
        "block": block,
        "onset_block": found[0] if found else None,
        "blocks": blocks,
        "position_frequency": outliers.mean(axis=0).tolist(),
        "position_kind": "position-fixed" if found else None,
        "neighbour_similarity": {"outliers": 0.8 if found else None, "others": 0.5},
        "register_norms": None,
        "cls_norms": None,
        "channels": [{"channel": 41, "share": 0.9}] if found else [],
        "faithfulness": make_faithfulness(depth) if examples[0].attention else None,
        "sinks": make_sinks(depth) if examples[0].attention else None,
        "ranges": make_ranges(depth),
        "verdict": ["Outliers were planted, see `conftest.py`."] if found else ["No patch stands out."],
        "skipped": [],
        "interrupted": False,
        "seconds": 1.5,
    }
