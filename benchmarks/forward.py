"""Is our forward pass as fast as timm's and transformers'? Same weights, process, dtype, device and batch.

    python benchmarks/forward.py [--device cuda] [--repeats 15] [--sizes small base] [--compile] [--json FILE]

Ratios are our time over theirs, medians of pairs of interleaved runs; below 1 we are faster. `rate` is the share of
the machine's matrix rate (a large product in the same dtype, measured here) that our forward reaches.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import timm
import torch
import transformers
from timing import default_device, interleaved, machine, matrix_rate, median_ratio

import vitreg
from vitreg.common.devices import resolve_device
from vitreg.training.engine.throughput import forward_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def models(size: str, registers: bool, pixels: int, device: str):
    """One set of weights in three libraries: DINOv2's architecture, with or without four registers."""
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    torch.manual_seed(0)
    peer = timm.create_model(name, img_size=pixels).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    ours = vitreg.from_timm(peer)
    with tempfile.TemporaryDirectory() as folder:
        vitreg.save(ours, Path(folder) / "model", "transformers")
        other = transformers.AutoModel.from_pretrained(Path(folder) / "model", attn_implementation="sdpa").eval()
    return ours.to(device), peer.to(device), other.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", default=["small", "base"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[224, 518])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="compile our model in the recommended setting")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = str(resolve_device(args.device))
    rates = {name: matrix_rate(dtype, device) for name, dtype in DTYPES.items()}
    print(machine(device), "; ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.items()))
    print("model   px  reg batch dtype   ours ms  /timm  /transformers  rate")
    rows, recommended = [], []
    for size in args.sizes:
        for pixels in args.pixels:
            batch = (8 if pixels <= 224 else 2) // (2 if size == "base" else 1)
            batch *= 32 if device.startswith("cuda") else 1
            for registers in (False, True):
                ours, peer, other = models(size, registers, pixels, device)
                images = torch.randn(batch, 3, pixels, pixels, device=device)
                flops = batch * forward_flops(ours.config, ours.config.grid)
                for label in args.dtypes:
                    dtype = DTYPES[label]
                    ours.to(dtype), peer.to(dtype), other.to(dtype)
                    x = images.to(dtype)
                    times = side_by_side(ours, peer, other, x, args.repeats)
                    middle = sorted(times["ours"])[args.repeats // 2]
                    row = {
                        "model": size,
                        "pixels": pixels,
                        "registers": 4 * registers,
                        "batch": batch,
                        "dtype": label,
                        "milliseconds": 1e3 * middle,
                        "to_timm": median_ratio(times["ours"], times["timm"]),
                        "to_transformers": median_ratio(times["ours"], times["transformers"]),
                        "share_of_matrix_rate": flops / middle / rates[label],
                    }
                    rows.append(row)
                    print(
                        f"{size:<6} {pixels:>4} {4 * registers:>3} {batch:>5} {label:<5} {1e3 * middle:>9.1f} "
                        f"{row['to_timm']:>6.3f} {row['to_transformers']:>10.3f} {row['share_of_matrix_rate']:>10.2f}",
                        flush=True,
                    )
                if "bf16" in args.dtypes:
                    recommended.append(recommended_ratio(ours, peer, images, args))
    if recommended:
        mean = math.exp(sum(map(math.log, recommended)) / len(recommended))
        print(
            f"recommended (bf16 weights{', compiled' if args.compile else ''}) / timm under bf16 autocast: "
            f"geometric mean {mean:.3f} of {', '.join(f'{r:.3f}' for r in recommended)}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(device), "rows": rows, "recommended": recommended}, indent=1),
            encoding="utf-8",
        )


def side_by_side(ours, peer, other, x: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    with torch.inference_mode():
        return interleaved(
            {
                "ours": lambda: ours(x),
                "timm": lambda: peer.forward_features(x),
                "transformers": lambda: other(x),
            },
            repeats,
        )


def recommended_ratio(ours, peer, images, args) -> float:
    """Our recommended setting against timm's usual one: fp32 weights under bf16 autocast."""
    ours, peer, half = ours.bfloat16(), peer.float(), images.bfloat16()
    fast = torch.compile(ours) if args.compile else ours

    def autocast():
        with torch.autocast(images.device.type, torch.bfloat16):
            return peer.forward_features(images)

    with torch.inference_mode():
        times = interleaved({"ours": lambda: fast(half), "timm": autocast}, args.repeats)
    return median_ratio(times["ours"], times["timm"])


if __name__ == "__main__":
    main()
