"""Does the feature pass keep the model busy? `extract` on files against the bare forward on preloaded batches.

    python benchmarks/features.py IMAGES --model NAME [--num-images 1000] [--repeats 5] [--core-time]

IMAGES: what `open_image_set` opens. Throughput is the pass's, with decoding and writing, as a share of the forward's,
the median of interleaved runs; every pass writes a new store, with the patch tokens of all images.
"""

import argparse
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, machine

import vitreg
from vitreg.common.memory import keep_freed_memory
from vitreg.images import Subset, open_image_set
from vitreg.probes import FeaturesConfig, extract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--core-time", action="store_true", help="instead of the wall clock (set OMP_NUM_THREADS=1)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[-1])
    args = parser.parse_args()
    keep_freed_memory()  # as the commands do
    vit = vitreg.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    device, images = next(vit.parameters()).device, open_image_set(args.folder)
    images = Subset(images, np.arange(min(args.num_images, len(images))))
    config = FeaturesConfig(blocks=tuple(args.blocks))
    pixels = torch.stack([vit.preprocess.pixels(images.image(i)) for i in range(len(images))])
    preloaded = [vit.preprocess.normalize(batch.to(device)) for batch in pixels.split(args.batch_size)]
    del pixels

    def forward() -> None:
        with torch.inference_mode():
            for batch in preloaded:
                vit(batch)

    def trace() -> None:
        with torch.inference_mode():
            for batch in preloaded:
                vit.trace(batch, blocks=config.blocks, hidden=True)

    with tempfile.TemporaryDirectory() as folder:
        number = count()

        def features() -> None:
            extract(vit, images, Path(folder) / str(next(number)), config, batch_size=args.batch_size)

        clock = time.process_time if args.core_time else time.perf_counter
        times = interleaved({"forward": forward, "trace": trace, "features": features}, args.repeats, clock)
        size = sum(file.stat().st_size for file in (Path(folder) / "0").iterdir())
    print(machine())
    for name, seconds in times.items():
        print(f"{name}: {len(images) / statistics.median(seconds):.1f} images/s")
    for name in ("trace", "features"):
        shares = [f / s for f, s in zip(times["forward"], times[name], strict=True)]
        print(
            f"throughput of {name} / forward: {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
        )
    print(f"size of the store: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
