"""Is a training step as fast as a plain loop around timm's model? Same weights, batch, loss, optimizer and dtype.

    python benchmarks/training.py [--size base] [--batch 128] [--dtype bfloat16] [--compile] [--drop-path 0.4]
    python benchmarks/training.py --data imagenet/    # also: how many images a second are decoded and augmented

The ratio is our time over theirs, the median of pairs of interleaved runs; below 1 we are faster. A step is forward,
backward, clipping, optimizer, and what the engine does beside: schedules, seeding, logging. `share` is the part of the
machine's matrix rate (a large product in the same dtype, measured here) that three times the forward's FLOPs make up.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from timing import default_device, interleaved, machine, matrix_rate, median_ratio
from timm.layers.drop import DropPath
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.optim._param_groups import param_groups_weight_decay
from timm.optim.lamb import Lamb

from vitreg.checkpoints.to_timm import to_timm_state
from vitreg.images import open_split
from vitreg.training import deit3
from vitreg.training.data.samples import SampleStream, default_workers, fetch
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.train_state import TrainState


def plain_loop(train_state: TrainState, batch: dict[str, torch.Tensor]):
    """What a user of timm would write."""
    config, device = train_state.config, train_state.processes.device
    state, options = to_timm_state(train_state.method.vit)
    model = timm.create_model(options["architecture"], **options["kwargs"])
    model.load_state_dict(state)
    model = model.to(device).train()
    for block in model.blocks if config.drop_path else ():
        block.drop_path1, block.drop_path2 = DropPath(config.drop_path), DropPath(config.drop_path)
    forward = torch.compile(model) if config.compile else model
    groups = param_groups_weight_decay(model, config.optimizer.weight_decay, ("pos_embed", "cls_token", "reg_token"))
    optimizer = Lamb(groups, lr=config.optimizer.lr, eps=config.optimizer.eps, max_grad_norm=None)
    loss = BinaryCrossEntropy(target_threshold=0.0)
    half = config.half

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = forward(batch["image"])
        loss(output.float(), batch["target"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(args: argparse.Namespace, processes: Distributed) -> dict:
    """Milliseconds a step, the ratio, and how far from the floor."""
    config = deit3(num_images=10 * args.batch, num_classes=1000, size=args.size, num_registers=args.registers)
    config = dataclasses.replace(
        config,
        batch_size=args.batch,
        num_steps=10**6,
        drop_path=args.drop_path,
        dtype=args.dtype,
        compile=args.compile,
        optimizer=dataclasses.replace(config.optimizer, lr=1e-6, warmup_steps=0),
    )
    train_state = TrainState(config, processes)
    target = torch.rand(args.batch, 1000).gt(0.99).float()
    batch = {"image": torch.randn(args.batch, 3, 224, 224), "target": target}
    batch = {name: rows.to(processes.device) for name, rows in batch.items()}
    runs = {"ours": lambda: train_state.advance([batch]), "timm": plain_loop(train_state, batch)}
    times = interleaved(runs, args.repeats)
    middle = statistics.median(times["ours"])
    rate = matrix_rate(getattr(torch, args.dtype), processes.device.type)
    flops = args.batch * config.method.flops(config.model, 1 - args.drop_path)
    quarter = args.repeats // 4
    ratios = sorted(a / b for a, b in zip(times["ours"], times["timm"], strict=True))
    return {
        "model": f"{args.size}/16",
        "registers": args.registers,
        "batch": args.batch,
        "dtype": args.dtype,
        "compiled": args.compile,
        "drop_path": args.drop_path,
        "milliseconds": 1e3 * middle,
        "images_per_second": args.batch / middle,
        "to_timm": median_ratio(times["ours"], times["timm"]),
        "quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "share_of_matrix_rate": flops / middle / rate,
    }


def decoding(data: Path, processes: Distributed, workers: int | None, count: int) -> dict:
    """Images a second that the engine's worker processes hand over, augmented and mixed, with nothing else to do."""
    images, _ = open_split(data)
    config = deit3(num_images=len(images), num_classes=len(images.classes), image_size=224, batch_size=64)
    stream = SampleStream(images, config.method.augmentation(config.model, images), 0)
    workers = default_workers(processes) if workers is None else workers
    steps = range(1 + count // 64)
    batches = fetch(stream, processes, batch_size=64, accumulation=1, steps=steps, num_workers=workers)
    next(batches)  # the workers are running
    start = time.perf_counter()
    total = 64 * sum(1 for _ in batches)
    return {"data": data.name, "workers": workers, "images_per_second": total / (time.perf_counter() - start)}


def main() -> None:
    on_gpu = default_device() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--size", default="base" if on_gpu else "small")
    parser.add_argument("--registers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 8)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--count", type=int, default=1024, help="images to decode")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    processes = Distributed.join(args.device)
    print(machine(args.device))
    results = {"machine": machine(args.device), "step": compare(args, processes)}
    step = results["step"]
    print(
        f"ViT-{step['model']}, {args.registers} registers, batch {args.batch}, {args.dtype}"
        f"{', compiled' if args.compile else ''}, drop path {args.drop_path}: {step['milliseconds']:.0f} ms, "
        f"{step['images_per_second']:.4g} images/s, {step['to_timm']:.3f} of timm's time "
        f"({step['quartiles'][0]:.3f} to {step['quartiles'][1]:.3f}), "
        f"{step['share_of_matrix_rate']:.0%} of the matrix rate"
    )
    if args.data is not None:
        results["decoding"] = found = decoding(args.data, processes, args.workers, args.count)
        print(f"{found['data']}: {found['images_per_second']:.4g} images/s from {found['workers']} worker processes")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
