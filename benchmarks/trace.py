"""Is looking free? Tracing all norms and the class token's attention, against a plain forward and against transformers.

    python benchmarks/trace.py [--device cuda] [--dtype bfloat16] [--repeats 9] [--size base] [--pixels 518] [--batch 4]
    python benchmarks/trace.py --high-resolution

Time: ratios of medians of pairs. Memory: peak above the plain forward's, from the allocator on a GPU; on a CPU the
resident memory, sampled in a fresh process each.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import threading
from pathlib import Path

import timm
import torch
import transformers
from timing import default_device, interleaved, machine, matrix_rate, median_ratio

import vitreg
from vitreg.common.devices import resolve_device
from vitreg.training.engine.throughput import forward_flops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model(size: str, pixels: int, device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    return vitreg.from_timm(timm.create_model(f"vit_{size}_patch14_dinov2", img_size=pixels)).to(device, dtype)


def peer(ours, device: str, dtype: torch.dtype):
    with tempfile.TemporaryDirectory() as folder:
        vitreg.save(ours, Path(folder) / "model", "transformers")
        path = Path(folder) / "model"
        return transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval().to(device, dtype)


KINDS = ("forward", "trace", "transformers", "transformers with attentions")


def run_of(kind: str, ours, other, images):
    return {
        "forward": lambda: ours(images),
        "trace": lambda: ours.trace(images, attention_from="cls"),
        "transformers": lambda: other(images),
        "transformers with attentions": lambda: other(images, output_attentions=True),
    }[kind]


def setup(size: str, pixels: int, batch: int, device: str, dtype: torch.dtype, with_peer: bool = True):
    ours = model(size, pixels, device, dtype)
    images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype)
    return ours, peer(ours, device, dtype) if with_peer else None, images


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
    if options[3].startswith("cuda"):
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
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", default="base")
    parser.add_argument("--pixels", type=int, default=518)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--high-resolution", action="store_true", help="only trace ViT-S/14 at 1792 px, 16384 patches")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, dtype = str(resolve_device(args.device)), DTYPES[args.dtype]
    rate = matrix_rate(dtype, device)
    print(f"{machine(device)}; {args.dtype} {rate / 1e12:.2f} TFLOP/s")
    if args.high_resolution:
        ours = model("small", 1792, device, dtype)
        with torch.inference_mode():
            images = torch.randn(1, 3, 1792, 1792, device=device, dtype=dtype)
            trace = ours.trace(images, attention_from="cls")
        assert trace.attention is not None
        print(f"rows of {tuple(trace.attention.to_patches.shape)}")
        print(f"high-water mark {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
        return
    options = (args.size, args.pixels, args.batch, device, dtype)
    parts = setup(*options)
    with torch.inference_mode():
        times = interleaved({kind: run_of(kind, *parts) for kind in KINDS}, args.repeats)
    config = parts[0].config
    flops = args.batch * forward_flops(config, config.grid)
    for kind in ("forward", "trace"):
        middle = statistics.median(times[kind])
        print(f"{kind}: {1e3 * middle:.1f} ms, {flops / middle / rate:.0%} of the matrix rate")
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
