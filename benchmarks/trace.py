"""Is looking free? Tracing all norms and the class token's attention, against a plain forward and against transformers.

    python benchmarks/trace.py [--repeats 9] [--size base] [--pixels 518] [--batch 4] [--high-resolution]

Time: ratios of medians of pairs. Memory: peak above the plain forward's, from the allocator on a GPU; on a CPU the
resident memory, sampled in a fresh process each.
"""

import argparse
import multiprocessing
import resource
import tempfile
import threading
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


KINDS = ("forward", "trace", "transformers", "transformers with attentions")


def run_of(kind: str, ours, other, images):
    return {
        "forward": lambda: ours(images),
        "trace": lambda: ours.trace(images, attention_from="cls"),
        "transformers": lambda: other(images),
        "transformers with attentions": lambda: other(images, output_attentions=True),
    }[kind]


def setup(size: str, pixels: int, batch: int, device: str, with_peer: bool = True):
    ours = model(size, pixels, device)
    return ours, peer(ours, device) if with_peer else None, torch.randn(batch, 3, pixels, pixels, device=device)


def _resident() -> float:
    """Megabytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**20


def _peak_on_cpu(kind: str, options: tuple, queue) -> None:
    """Megabytes that a run adds, sampled every millisecond in a process that has run nothing else."""
    run = run_of(kind, *setup(*options, with_peer=kind.startswith("transformers")))
    before, peak, done = _resident(), 0.0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    thread = threading.Thread(target=sample)
    thread.start()
    with torch.inference_mode():
        result = run()
    done.set()
    thread.join()
    del result
    queue.put(peak - before)


def peak_megabytes(kind: str, options: tuple) -> float:
    if options[-1] == "cuda":
        run = run_of(kind, *setup(*options))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_on_cpu, args=(kind, options, queue))
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
    parts = setup(*options)
    with torch.inference_mode():
        times = interleaved({kind: run_of(kind, *parts) for kind in KINDS}, args.repeats)
    del parts
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
