"""Does a test-time register fix a real checkpoint, and what does it cost in accuracy?

    python benchmarks/real_fix.py PHOTOGRAPHS --model vit_tiny_patch16_224.augreg_in21k_ft_in1k

PHOTOGRAPHS is a folder with one photograph of each ImageNet-1k class, in the order of the classes. Every fifth finds
the units, the others measure: outliers and norms of every block, the register's norm, and top-1 before and after; with
the register counted as often in attention as `add_test_time_registers` chooses, and once, as published.
"""

import argparse

import torch
from timing import machine

import vitreg
from vitreg.images import ImageStream, find_images


@torch.inference_mode()
def predictions(vit, paths) -> torch.Tensor:
    return torch.cat([vit.classify(batch.images).argmax(-1) for batch in ImageStream(paths, vit.preprocess)])


def report(name: str, vit, fixed, paths, labels, before: torch.Tensor) -> None:
    comparison = vitreg.compare(vit, fixed, paths, max_examples=0)
    after = predictions(fixed, paths)
    top1 = [float((answers == labels).float().mean()) for answers in (before, after)]
    affected = [b for b in comparison.blocks if b.outlier_fraction_before]
    print(f"\n{name}: units {fixed.config.register_neurons}, counted {fixed.config.register_weight} times")
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
    print(f"  top-1: {top1[0]:.4f} -> {top1[1]:.4f}; same answer {comparison.head_agreement:.4f}")
    print(f"  cosine: patches {comparison.patch_similarity:.4f}, class token {comparison.cls_similarity:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs")
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    options = parser.parse_args()
    print(machine())
    vit = vitreg.load(options.model)
    paths = find_images([options.photographs])
    chosen = [i for i in range(len(paths)) if i % 5]
    labels = torch.tensor(chosen)
    others = [paths[i] for i in chosen]
    print(f"found on {len(paths) - len(others)} photographs, measured on {len(others)}")
    fixed = vitreg.add_test_time_registers(vit, paths[::5])
    print(fixed.config.changes[-1])
    before = predictions(vit, others)
    report("as chosen", vit, fixed, others, labels, before)
    published = vitreg.add_test_time_registers(vit, neurons=fixed.config.register_neurons)
    report("as published", vit, published, others, labels, before)
