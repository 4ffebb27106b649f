"""Object discovery: against a literal LOST, against the bare forward, and at 60000 patches.

    python benchmarks/discovery.py [--repeats 15]             # LOST, features given, against the literal implementation
    python benchmarks/discovery.py --images FOLDER          # the whole command against the bare forward
    python benchmarks/discovery.py --high-resolution          # 4000 x 3000 pixels at patch 14, one process, peak memory

The literal implementation does what the reference (valeoai/LOST, object_discovery.py) does, with whole matrices in
torch. Ratios are medians over pairs of runs made side by side.
"""

import argparse
import contextlib
import io
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.ndimage
import timm
import torch
from timing import interleaved, machine, median_ratio
from torch import Tensor

import vitreg
from vitreg.cli.discover import discover
from vitreg.cli.options import Batching, Checkpoint
from vitreg.discovery.discover import native_stream
from vitreg.discovery.lost import lost
from vitreg.images import find_images


def literal(features: Tensor, grid: tuple[int, int], k_patches: int = 100) -> tuple[int, int, int, int]:
    """Seed expansion and box as the reference writes them."""
    gram = features @ features.T
    others = gram.clone()
    others.fill_diagonal_(0)
    others[others < 0] = 0
    degree = (others > 0).sum(1)
    lowest = degree.argsort(stable=True)[:k_patches]
    members = lowest[gram[lowest[0], lowest] > 0]
    labels, _ = scipy.ndimage.label((gram[members].sum(0) > 0).reshape(grid).numpy())  # pyright: ignore
    rows, columns = np.where(labels == labels[divmod(int(lowest[0]), grid[1])])
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def features_of(grid: tuple[int, int], dim: int = 384) -> Tensor:
    """Smooth noise: neighbors alike, as in images, so that components are objects."""
    noise = torch.randn(1, dim, grid[0] // 4 + 1, grid[1] // 4 + 1)
    smooth = torch.nn.functional.interpolate(noise, size=grid, mode="bilinear")
    return (smooth + 0.3 * torch.randn(1, dim, *grid)).flatten(2)[0].T.contiguous()


def against_literal(repeats: int) -> None:
    for grid in ((30, 40), (60, 80)):
        features = features_of(grid)
        assert lost(features, grid).box(1, *grid) == literal(features, grid)
        buffer = torch.empty(len(features), len(features))
        runs = {
            "ours": lambda f=features, g=grid: lost(f, g),
            "literal": lambda f=features, g=grid: literal(f, g),
            "gram": lambda f=features, b=buffer: torch.mm(f, f.T, out=b),
        }
        times = interleaved(runs, repeats)
        print(
            f"{grid[0] * grid[1]} patches x 384: ours {1e3 * statistics.median(times['ours']):.1f} ms, "
            f"{median_ratio(times['literal'], times['ours']):.2f} x faster than literal "
            f"(the Gram product alone {median_ratio(times['literal'], times['gram']):.2f} x)"
        )


class Ready(Checkpoint):
    """A checkpoint that is loaded already."""

    def load(self):
        return model()


def model(architecture: str = "vit_small_patch16_224"):
    torch.manual_seed(0)
    vit = _MODELS.get(architecture)
    return vit or _MODELS.setdefault(architecture, vitreg.from_timm(timm.create_model(architecture)).eval())


_MODELS: dict[str, vitreg.VisionTransformer] = {}


def against_forward(folder: str, repeats: int, limit: int) -> None:
    vit, paths = model(), find_images(folder)[:limit]
    batches = [batch.images for batch in native_stream(vit, paths, batch_size=1, strict=True)]

    def forward() -> None:
        with torch.inference_mode():
            for images in batches:
                vit(images)

    def command(overlays: bool) -> None:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            names = [str(path) for path in paths]
            discover(names, model=Ready(""), out=Path(out), overlays=overlays, reading=Batching(batch_size=1))

    times = interleaved({"forward": forward, "command": lambda: command(True), "bare": lambda: command(False)}, repeats)
    print(
        f"ViT-S/16, {len(paths)} images, bare forward {len(paths) / statistics.median(times['forward']):.2f} a second"
    )
    print(f"whole command / bare forward, throughput: {median_ratio(times['forward'], times['command']):.3f}")
    print(f"the same with --no-overlays: {median_ratio(times['forward'], times['bare']):.3f}")


def high_resolution() -> None:
    """A photograph of 4000 x 3000 pixels at patch 14: 286 x 215 patches."""
    features = features_of((215, 286))
    start = time.perf_counter()
    lost(features, (215, 286))
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"LOST, {len(features)} patches x 384: {seconds:.1f} s, peak of the process {peak / 2**20:.2f} GiB")
    vit = model("vit_small_patch14_dinov2")
    start = time.perf_counter()
    (found,) = vitreg.discover_objects(vit, torch.randn(1, 3, 3000, 4000))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"ViT-S/14 and LOST, grid {found.mask.shape}: {time.perf_counter() - start:.0f} s, peak {peak / 2**20:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--images", help="a folder: measure the whole command on its first --limit images")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--high-resolution", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    if args.high_resolution:
        high_resolution()
    elif args.images:
        against_forward(args.images, args.repeats, args.limit)
    else:
        against_literal(args.repeats)


if __name__ == "__main__":
    main()
