"""Does a test-time register fix a real checkpoint, and what does it cost in accuracy?

    python benchmarks/real_fix.py PHOTOGRAPHS --model vit_tiny_patch16_224.augreg_in21k_ft_in1k

PHOTOGRAPHS is a folder with one photograph of each ImageNet-1k class, in the order of the classes. Every fifth finds
the units, the others measure: outliers and norms of every block, the register's norm, and top-1 before and after; with
the register counted as often in attention as `add_test_time_registers` chooses, and once, as published; and baked into
plain weights, as timm reads and runs the file. Of a model without a classifier, in place of top-1, the cosine of what
its head gives. `--fixed FILE` takes a fix that `vitreg fix` has saved.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timing import machine

import vitreg
from vitreg.images import ImageStream, find_images


@torch.inference_mode()
def outputs(head, preprocess, paths) -> torch.Tensor:
    return torch.cat([head(batch.images) for batch in ImageStream(paths, preprocess)]).float()


def report(name: str, vit, fixed, paths, labels, before: torch.Tensor, head=None) -> None:
    comparison = vitreg.compare(vit, fixed, paths, max_examples=0)
    after = outputs(head or fixed.classify, vit.preprocess, paths)
    affected = [b for b in comparison.blocks if b.outlier_fraction_before]
    print(f"\n{name}: {fixed.config.register_neurons} moved, counted {fixed.config.register_weight} times")
    print(f"  outcome: {comparison.outcome}")
    worst = max(comparison.blocks, key=lambda b: b.outlier_fraction_after)
    most = max(b.outlier_fraction_before for b in affected)
    print(f"  outliers, worst block: {most:.4%} -> {worst.outlier_fraction_after:.4%}")
    print(f"  largest norm / p99 after, worst block: {max(b.max_after / b.p99_after for b in affected):.2f}")
    norms = comparison.after.register_norms
    print(f"  register norm after the last block: {norms[-1].mean():.0f}")
    on_outliers = max(b.attention_on_outliers_before or 0 for b in affected)
    on_register = max(b.attention_on_registers_after or 0 for b in affected)
    print(f"  attention on outliers before {on_outliers:.3f}, on the register after {on_register:.3f}")
    if before.shape[1] == 1000:
        top1 = [float((answers.argmax(-1) == labels).float().mean()) for answers in (before, after)]
        print(f"  top-1: {top1[0]:.4f} -> {top1[1]:.4f}; same answer {comparison.head_agreement:.4f}")
    else:
        print(f"  cosine of what the head gives: {F.cosine_similarity(before, after, dim=-1).mean():.4f}")
    print(f"  cosine: patches {comparison.patch_similarity:.4f}, class token {comparison.cls_similarity:.4f}")


def bake(fixed, paths):
    """The baked model, and what timm makes of its file."""
    begun = time.perf_counter()
    baked = vitreg.bake_registers(fixed, paths)
    print(f"\n{baked.config.changes[-1]}\n  it took {time.perf_counter() - begun:.0f} s")
    old, size = fixed.state_dict(), 0
    for key, value in baked.state_dict().items():
        changed = value if value.shape != old[key].shape else value[value != old[key]]
        size += changed.numel() * changed.element_size()
    print(f"  {size} bytes of {sum(v.numel() * v.element_size() for v in old.values())} changed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "baked.safetensors")
        vitreg.save(baked, path, format="timm")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        kwargs = json.loads(metadata["kwargs"])
        print(f"  timm.create_model({metadata['architecture']!r}, **{kwargs})")
        model = timm.create_model(metadata["architecture"], checkpoint_path=str(path), **kwargs).eval()
    dtype = baked.patch_embed.weight.dtype
    model.to(dtype).register_forward_pre_hook(lambda _, args: args[0].to(dtype))
    return baked, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs")
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--fixed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, help="measure on the first so many of the others")
    options = parser.parse_args()
    print(machine())
    dtype = getattr(torch, options.dtype)
    vit = vitreg.load(options.model, dtype=dtype)
    paths = find_images([options.photographs])
    chosen = [i for i in range(len(paths)) if i % 5][: options.limit]
    labels = torch.tensor(chosen)
    others = [paths[i] for i in chosen]
    print(f"found on {len(paths[::5])} photographs, measured on {len(others)}")
    if options.fixed:
        fixed = vitreg.load(options.fixed, dtype=dtype)
    else:
        fixed = vitreg.add_test_time_registers(vit, paths[::5])
    print(fixed.config.changes[-1])
    before = outputs(vit.classify, vit.preprocess, others)
    baked, model = bake(fixed, paths[::5])
    report("baked, in timm", vit, vitreg.from_timm(model), others, labels, before, head=model)
    report("as chosen", vit, fixed, others, labels, before)
    between = vitreg.compare(fixed, baked, others, max_examples=0)
    print(f"\nbaked against as chosen: cosine of patches {between.patch_similarity:.4f}, ", end="")
    print(f"class token {between.cls_similarity:.4f}; same answer {between.head_agreement:.4f}")
    published = vitreg.add_test_time_registers(vit, neurons=fixed.config.register_neurons)
    report("as published", vit, published, others, labels, before)
