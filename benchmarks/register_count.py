"""What do registers cost? Parameters, FLOPs, latency and memory, beside what the number of tokens predicts.

    python benchmarks/register_count.py [--sizes small base large] [--resolutions 224 518] [--registers 0 1 2 4 8 16]
        [--repeats 31] [--batch N] [--dtype fp32] [--json FILE]

The paper's Fig. 12, on DINOv2's architecture (patch 14: 257 and 1370 tokens without registers). Ratios are to the model
without registers.

- tokens: (T + R) / T, the prediction that latency and FLOPs should stay within 2 % of.
- FLOPs: counted by PyTorch (`torch.utils.flop_counter`); predicted: projections and MLP in proportion to the tokens,
  attention to their square, the patch embedding to neither.
- latency: median, and quartiles, of ratios of runs made side by side in one process, in rotating order, so that drift
  cancels. All models share the blocks' weights. A second run without registers shows what the machine can resolve.
- memory: peak of one forward above weights and input, from PyTorch's allocator: `max_memory_allocated` on a GPU, the
  profiler's record of every allocation on a CPU. Scratch space that kernels take from the system is not in it.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from timing import interleaved, machine, matrix_rate
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import vitreg
from vitreg.training.engine.throughput import forward_flops
from vitreg.training.recipes.sizes import sized

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGAIN = "again"
BOUND = 0.02
# Of the matrix rate, for the estimate of the total time; `benchmarks/forward.py` measures it.
USUAL_SHARE = 0.6


def models(size: str, pixels: int, counts: list[int], device: str, dtype: torch.dtype):
    """The model by number of registers; they differ in these alone."""
    torch.manual_seed(0)
    config = sized(size, patch_size=14, image_size=pixels, num_registers=0, layer_scale=True)
    base = vitreg.VisionTransformer(config).eval().to(device, dtype)
    found = {0: base}
    for count in filter(None, counts):
        found[count] = vitreg.add_registers(base, count).eval().to(device, dtype)
        found[count].blocks = base.blocks
    return found


def counted_flops(config) -> int:
    """For one image; no arithmetic is done."""
    vit = vitreg.VisionTransformer(config).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        vit(torch.empty(1, 3, *config.image_size, device="meta"))
    return counter.get_total_flops()


def peak_memory(vit, images: torch.Tensor) -> int:
    """Bytes of PyTorch's allocator that a forward needs at once, beside weights and input."""
    if images.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vit(images)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        vit(images)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        record.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def measure(size: str, pixels: int, counts: list[int], batch: int, repeats: int, device: str, dtype: torch.dtype):
    """A row for each number of registers, the model without first and last."""
    vits = models(size, pixels, counts, device, dtype)
    images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype)
    with torch.inference_mode():
        runs = {str(count): (lambda vit=vit: vit(images)) for count, vit in vits.items()}
        times = interleaved(runs | {AGAIN: runs["0"]}, repeats)
        memory = {count: peak_memory(vit, images) for count, vit in vits.items()}
    flops = {count: counted_flops(vit.config) for count, vit in vits.items()}
    formula = {count: forward_flops(vit.config, vit.config.grid) for count, vit in vits.items()}
    tokens = {
        count: vit.config.num_prefix_tokens + vit.config.grid[0] * vit.config.grid[1] for count, vit in vits.items()
    }
    for name in times:
        count = 0 if name == AGAIN else int(name)
        pairs = [ours / base for ours, base in zip(times[name], times["0"], strict=True)]
        yield {
            "size": size,
            "pixels": pixels,
            "batch": batch,
            "registers": count,
            "again": name == AGAIN,
            "parameters": sum(parameter.numel() for parameter in vits[count].parameters()),
            "gflops": flops[count] / 1e9,
            "milliseconds": 1e3 * statistics.median(times[name]),
            "megabytes": memory[count] / 2**20,
            "token_ratio": tokens[count] / tokens[0],
            "flops_ratio": flops[count] / flops[0],
            "flops_predicted": formula[count] / formula[0],
            "latency_ratio": statistics.median(pairs),
            "latency_quartiles": statistics.quantiles(pairs, n=4)[::2],
            "memory_ratio": memory[count] / memory[0],
            "seconds": times[name],
        }


HEADER = (
    "model | px | batch | registers | parameters | GFLOPs | ms | MB | tokens | FLOPs | predicted | "
    "latency | quartiles | latency / tokens | latency / FLOPs | memory"
)


def line(row: dict) -> str:
    low, high = row["latency_quartiles"]
    cells = [
        row["size"],
        row["pixels"],
        row["batch"],
        f"{row['registers']}{', again' if row['again'] else ''}",
        f"{row['parameters']:,}",
        f"{row['gflops']:.2f}",
        f"{row['milliseconds']:.1f}",
        f"{row['megabytes']:.1f}",
        f"{row['token_ratio']:.4f}",
        f"{row['flops_ratio']:.4f}",
        f"{row['flops_predicted']:.4f}",
        f"{row['latency_ratio']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{100 * (row['latency_ratio'] / row['token_ratio'] - 1):+.1f} %",
        f"{100 * (row['latency_ratio'] / row['flops_ratio'] - 1):+.1f} %",
        f"{row['memory_ratio']:.4f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def verdict(rows: list[dict], what: str) -> str:
    """How far a ratio is from that of the tokens."""
    deviations = [row[what] / row["token_ratio"] - 1 for row in rows if row["registers"]]
    within = sum(abs(deviation) <= BOUND for deviation in deviations)
    return (
        f"{what} / token_ratio: {100 * min(deviations):+.2f} % to {100 * max(deviations):+.2f} %, "
        f"{within} of {len(deviations)} within {BOUND:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "base", "large"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[224, 518])
    parser.add_argument("--registers", nargs="+", type=int, default=[0, 1, 2, 4, 8, 16], help="0 is always measured")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--batch", type=int, help="images at a time; by default fewer where they are larger")
    parser.add_argument("--dtype", choices=list(DTYPES), help="by default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    label = args.dtype or ("bf16" if device == "cuda" else "fp32")
    counts = sorted({0, *args.registers})

    def batch_of(size: str, pixels: int) -> int:
        small = {"small": 1, "base": 2, "large": 4}.get(size, 4)
        return args.batch or max(1, (8 if pixels <= 224 else 2) // small) * (32 if device == "cuda" else 1)

    work = 0.0
    for size in args.sizes:
        for pixels in args.resolutions:
            config = sized(size, patch_size=14, image_size=pixels, num_registers=0)
            # Each number of registers and the second run without, two warm-ups and the memory beside the repeats.
            work += batch_of(size, pixels) * forward_flops(config, config.grid) * (len(counts) + 1) * (args.repeats + 3)
    rate = matrix_rate(DTYPES[label], device)
    print(f"{machine()}, {label} {rate / 1e12:.2f} TFLOP/s; about {work / rate / USUAL_SHARE / 60:.1f} minutes")
    print(f"| {HEADER} |\n|{'---|' * len(HEADER.split('|'))}")
    rows = []
    for size in args.sizes:
        for pixels in args.resolutions:
            batch = batch_of(size, pixels)
            for row in measure(size, pixels, counts, batch, args.repeats, device, DTYPES[label]):
                rows.append(row)
                print(line(row), flush=True)
    for what in ("flops_ratio", "latency_ratio"):
        print(verdict(rows, what))
    floor = max(abs(row["latency_ratio"] - 1) for row in rows if row["again"])
    print(f"without registers against itself: up to {100 * floor:.2f} % apart")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(), "dtype": label, "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
