"""Does a diagnosis keep the model busy? `diagnose` on files against the bare forward on preloaded batches.

    python benchmarks/diagnose.py PHOTOGRAPHS --model NAME [--num-images 200] [--repeats 5] [--core-time]

Throughput is the diagnosis's, decoding included, as a share of the forward's, the median of interleaved runs. Memory is
the high-water mark of the process after few and after all images.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from timing import interleaved, machine

import vitreg
from vitreg.common.memory import keep_freed_memory
from vitreg.images import ImageStream, find_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--core-time", action="store_true", help="instead of the wall clock (set OMP_NUM_THREADS=1)")
    args = parser.parse_args()
    keep_freed_memory()  # as the commands do
    vit = vitreg.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    paths = find_images(args.photographs)
    few = paths[: args.num_images]
    device = next(vit.parameters()).device
    preloaded = [b.images for b in ImageStream(few, vit.preprocess, batch_size=args.batch_size, device=device)]

    def forward() -> None:
        with torch.inference_mode():
            for batch in preloaded:
                vit(batch)

    runs = {"forward": forward, "diagnose": lambda: vitreg.diagnose(vit, few, batch_size=args.batch_size)}
    times = interleaved(runs, args.repeats, time.process_time if args.core_time else time.perf_counter)
    print(machine())
    for name, seconds in times.items():
        print(f"{name}: {len(few) / statistics.median(seconds):.1f} images/s")
    shares = [f / d for f, d in zip(times["forward"], times["diagnose"], strict=True)]
    print(f"throughput of diagnose / forward: {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})")
    marks = []
    for number in (args.num_images, len(paths)):
        vitreg.diagnose(vit, paths[:number], batch_size=args.batch_size)
        marks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"high-water mark: {marks[0]:.0f} MB after {args.num_images} images, {marks[1]:.0f} MB after {len(paths)}")


if __name__ == "__main__":
    main()
