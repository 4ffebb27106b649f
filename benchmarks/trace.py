"""Is looking free? Tracing all norms and the class token's attention, against a plain forward and against transformers.

    python benchmarks/trace.py [--repeats 9] [--size base] [--pixels 518] [--batch 4] [--high-resolution]

Time: ratios of medians of pairs. Memory: peak above the plain forward's, from the allocator on a GPU and from the
process's high-water mark in a fresh process each on a CPU.
"""

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path

import timm
import torch
import transformers
from timing import interleaved, machine, median_ratio

import vitreg


def model(size: str, pixels: int, device: str):
    torch.manual_seed(0)
    return vitreg.from_timm(timm.create_model(f"vit_{size}_patch14_dinov2", img_size=pixels)).to(device)


def peer(ours, device: str):
    with tempfile.TemporaryDirectory() as folder:
        vitreg.save(ours, Path(folder) / "model", "transformers")
        path = Path(folder) / "model"
        return transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval().to(device)


def runs(size: str, pixels: int, batch: int, device: str):
    ours = model(size, pixels, device)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    other = peer(ours, device)
    return {
        "forward": lambda: ours(images),
        "trace": lambda: ours.trace(images, attention_from="cls"),
        "transformers": lambda: other(images),
        "transformers with attentions": lambda: other(images, output_attentions=True),
    }


def _high_water(kind: str, options: tuple, queue) -> None:
    """Megabytes that one run adds to the high-water mark of a process that has run nothing else."""
    with torch.inference_mode():
        run = runs(*options)[kind]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peak_megabytes(kind: str, options: tuple) -> float:
    if options[-1] == "cuda":
        run = runs(*options)[kind]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_high_water, args=(kind, options, queue))
    process.start()
    megabytes = queue.get()
    process.join()
    return megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", default="base")
    parser.add_argument("--pixels", type=int, default=518)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--high-resolution", action="store_true", help="only trace ViT-S/14 at 1792 px, 16384 patches")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine())
    if args.high_resolution:
        ours = model("small", 1792, device)
        with torch.inference_mode():
            trace = ours.trace(torch.randn(1, 3, 1792, 1792, device=device), attention_from="cls")
        assert trace.attention is not None
        print(f"rows of {tuple(trace.attention.to_patches.shape)}")
        print(f"high-water mark {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
        return
    options = (args.size, args.pixels, args.batch, device)
    with torch.inference_mode():
        times = interleaved(runs(*options), args.repeats)
    for ours, theirs in (
        ("trace", "forward"),
        ("transformers with attentions", "transformers"),
        ("trace", "transformers with attentions"),
    ):
        print(f"time of {ours} / {theirs}: {median_ratio(times[ours], times[theirs]):.3f}")
    plain = {kind: peak_megabytes(kind, options) for kind in times}
    print(f"extra memory of trace: {plain['trace'] - plain['forward']:.0f} MB")
    extra = plain["transformers with attentions"] - plain["transformers"]
    print(f"extra memory of transformers with attentions: {extra:.0f} MB")


if __name__ == "__main__":
    main()
