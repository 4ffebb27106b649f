"""What `vitreg diagnose` says of two or more models, with intervals: the figures of section 2 of the paper.

    python benchmarks/evidence.py PHOTOGRAPHS --models clip_vit_b16 fixed.safetensors [--dtype bfloat16] [--json FILE]
        [--figure FILE.png]

Every figure is a mean over images with its 95 % bootstrap interval; those of the further models come with their
difference to the first, paired by image. Outliers are those of the first model's thresholds in all of them, so that a
fix is judged by what was wrong before; the figure is of the first model and the last. "Patches that ... attends to" is
the exponential of the entropy of a row of the attention matrix of the last block, mean over heads, without what
registers and class token receive: so many equal patches would be as spread out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from timing import machine

import vitreg
from vitreg.artifacts import neighbour_similarity
from vitreg.common.bootstrap import percentile_interval, resampled_sums
from vitreg.images import Batches


def effective_patches(rows: torch.Tensor) -> torch.Tensor:
    """`[B, H, h, w]` to `[B]`: the mean over heads of the exponential of the entropy."""
    shares = rows.flatten(2).double()
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp().mean(-1)


@torch.inference_mode()
def of_images(vit, photographs: str, thresholds: list[float], batch_size: int) -> dict[str, np.ndarray]:
    """For every figure the numerator and the denominator of each image, `[N, 2]`."""
    found: dict[str, list[torch.Tensor]] = {}

    def add(name: str, values: torch.Tensor, of: torch.Tensor | None = None) -> None:
        of = torch.ones(len(values)) if of is None else of
        found.setdefault(name, []).append(torch.stack([values.double().cpu(), of.double().cpu()], 1))

    cuts = torch.tensor(thresholds)[:, None, None, None]
    for images, _ in Batches(photographs, vit.preprocess, batch_size=batch_size):
        images = images.to(next(vit.parameters()))
        row, column = (side // vit.config.patch_size // 2 for side in images.shape[-2:])
        queries = ["cls", *(["registers"] if vit.num_registers else []), (row, column)]
        trace = vit.trace(images, attention_from=queries, embeddings=True)
        outliers = trace.patch_norms >= cuts
        num_patches = torch.full((len(images),), outliers[0, 0].numel())
        similarity = neighbour_similarity(trace.embeddings, outliers.shape[-2:])
        last = outliers[-1]
        add("cosine with neighbors, outliers", (similarity * last).sum((1, 2)), last.sum((1, 2)))
        add("cosine with neighbors, others", (similarity * ~last).sum((1, 2)), (~last).sum((1, 2)))
        for block, marked in enumerate(outliers):
            add(f"outliers after block {block}, %", 100 * marked.sum((1, 2)), num_patches)
        received = trace.attention.to_patches.float().mean(2)[:, :, 0]
        for block in range(1, len(outliers)):
            share = (received[block] * outliers[block - 1]).sum((1, 2))
            add(f"class token's attention on outliers in block {block}, %", 100 * share)
        if vit.num_registers:
            for block, share in enumerate(trace.attention.to_registers.float()[:, :, :, 0].mean(2).sum(-1)):
                add(f"class token's attention on registers in block {block}, %", 100 * share)
        for number, query in enumerate(trace.attention.queries):
            add(f"patches that the {query} attends to", effective_patches(trace.attention.to_patches[-1, :, :, number]))
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def said(values: np.ndarray, baseline: np.ndarray | None) -> dict:
    """A figure with its interval, and its difference to another model's."""
    resampled = ratio(resampled_sums(values))
    result = {"value": float(ratio(values.sum(0))), "interval": percentile_interval(resampled).tolist()}
    if baseline is not None:
        difference = resampled - ratio(resampled_sums(baseline))
        result["difference"] = result["value"] - float(ratio(baseline.sum(0)))
        result["difference_interval"] = percentile_interval(difference).tolist()
    return result


def draw(before: vitreg.Diagnosis, after: vitreg.Diagnosis, path: Path) -> None:
    """Histograms of the reported block (Fig. 3), and outliers and largest norms by block (Fig. 4a)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained", dpi=110)
    histogram, norms, shares = figure.subplots(1, 3)
    for diagnosis, label, color in ((before, "before", "#c2410c"), (after, "after", "#1d4ed8")):
        edges, counts = diagnosis.blocks[before.block].histogram
        histogram.stairs(np.array(counts) / sum(counts) * 100, edges, fill=True, alpha=0.5, color=color, label=label)
        depth = range(len(diagnosis.blocks))
        norms.plot(depth, [block.max for block in diagnosis.blocks], color=color, label=f"{label}, largest")
        norms.plot(depth, [block.median for block in diagnosis.blocks], "--", color=color, label=f"{label}, median")
        found = [100 * block.outlier_fraction for block in diagnosis.blocks]
        shares.plot(depth, found, color=color, label=f"{label}, outliers")
    seen = [100 * (block.attention_on_outliers or 0) for block in before.blocks]
    shares.plot(range(len(seen)), seen, ":", color="#c2410c", label="before, attention on them")
    histogram.set(xscale="log", yscale="log", xlabel=f"patch norm after block {before.block}", ylabel="% of patches")
    norms.set(yscale="log", xlabel="block", ylabel="patch norm")
    shares.set(xlabel="block", ylabel="%")
    for axes in (norms, shares):
        axes.set_xticks(range(0, len(before.blocks), 2))
    for axes in (histogram, norms, shares):
        axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    print(machine())
    first = vitreg.load(options.models[0], dtype=getattr(torch, options.dtype))
    diagnosis = vitreg.diagnose(first, options.photographs, max_examples=0, batch_size=options.batch_size)
    thresholds = [block.threshold or float("inf") for block in diagnosis.blocks]
    print(diagnosis.verdict[0])
    measured: dict[str, dict[str, np.ndarray]] = {}
    results: dict[str, dict] = {}
    for name in options.models:
        vit = vitreg.load(name, dtype=getattr(torch, options.dtype))
        measured[name] = of_images(vit, options.photographs, thresholds, options.batch_size)
        baseline = measured[options.models[0]] if len(measured) > 1 else {}
        # Of outliers there is nothing to say where there are none.
        present = {key: values for key, values in measured[name].items() if values[:, 1].any()}
        results[name] = {key: said(values, baseline.get(key)) for key, values in present.items()}
        print(f"\n{name}")
        if options.figure and name == options.models[-1]:
            after = vitreg.diagnose(vit, options.photographs, max_examples=0, batch_size=options.batch_size)
            draw(diagnosis, after, options.figure)
        for key, figure in results[name].items():
            low, high = figure["interval"]
            line = f"  {key}: {figure['value']:.3f} [{low:.3f}, {high:.3f}]"
            if "difference" in figure:
                below, above = figure["difference_interval"]
                line += f", {figure['difference']:+.3f} [{below:+.3f}, {above:+.3f}]"
            print(line)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "models": results}, indent=1), encoding="utf-8")
