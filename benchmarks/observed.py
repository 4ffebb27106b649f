"""What does observing cost? A pass with hooks, against the module's own forward.

    python benchmarks/observed.py [--device cuda] [--repeats 15] [--batch 8] [--core-time] [MODEL ...]

Models are timm's, with random weights. The pass records what `diagnose` asks for: norms, embeddings, and the class
token's attention where there is one. Ratios are medians of pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from timing import default_device, interleaved, machine, median_ratio

import vitreg
from vitreg.common.devices import resolve_device

MODELS = ("vit_tiny_patch16_224", "vit_base_patch16_224", "hiera_tiny_224")


def runs_of(module: torch.nn.Module, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    observed = vitreg.observe(module)
    images = torch.randn(batch, 3, *observed.preprocess.size, device=device)
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: module(images),
        "norms": lambda: observed.trace(images, embeddings=True),
    }
    if not observed.config.no_attention:
        runs["with attention"] = lambda: observed.trace(images, embeddings=True, attention_from="cls")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--core-time", action="store_true", help="of this process, on a machine that others use")
    args = parser.parse_args()
    device = resolve_device(args.device)
    print(f"{machine(str(device))}; batches of {args.batch}")
    for name in args.models:
        torch.manual_seed(0)
        module = timm.create_model(name).eval().to(device)
        runs = runs_of(module, args.batch, device)
        with torch.no_grad():
            times = interleaved(runs, args.repeats, time.process_time if args.core_time else time.perf_counter)
        ratios = ", ".join(f"{kind} {median_ratio(times[kind], times['forward']):.3f}" for kind in list(runs)[1:])
        print(f"{name}: forward {1e3 * statistics.median(times['forward']):.1f} ms; times the forward: {ratios}")


if __name__ == "__main__":
    main()
