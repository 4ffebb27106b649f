"""Is a training step as fast as a plain loop around timm's model? Same weights, batch, loss, optimizer and dtype.

    python benchmarks/training.py [--size base] [--batch 128] [--precision bfloat16] [--compile] [--repeats 15]
    python benchmarks/training.py --data imagenet/    # also: how many pictures a second are decoded and augmented

The ratio is our time over theirs, the median of pairs of interleaved runs; below 1 we are faster. A step is forward,
backward, clipping, optimizer, and what the engine does beside: schedules, seeding, logging. `share` is the part of the
machine's matrix rate (a large product in the same dtype, measured here) that three times the forward's FLOPs make up.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path

import timm
import torch
from timing import forward_flops, interleaved, machine, matrix_rate, median_ratio
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.optim._param_groups import param_groups_weight_decay
from timm.optim.lamb import Lamb

from vitreg.checkpoints.to_timm import to_timm_state
from vitreg.images import open_split
from vitreg.training import deit3
from vitreg.training.engine import Training
from vitreg.training.processes import Processes
from vitreg.training.run_folder import RunFolder
from vitreg.training.samples import SampleStream, default_workers, fetch

NUM_CLASSES = 1000


def plain_loop(training: Training, batch: dict[str, torch.Tensor], compiled: bool):
    """What a user of timm would write."""
    config = training.config
    state, options = to_timm_state(training.method.vit)
    model = timm.create_model(options["architecture"], **options["kwargs"])
    model.load_state_dict(state)
    model = model.to(training.processes.device).train()
    forward = torch.compile(model) if compiled else model
    groups = param_groups_weight_decay(model, config.optimizer.weight_decay, ("pos_embed", "cls_token", "reg_token"))
    optimizer = Lamb(groups, lr=1e-6, max_grad_norm=None)
    loss = BinaryCrossEntropy(target_threshold=0.0)
    half = config.precision == "bfloat16"

    def step() -> None:
        with torch.autocast(training.processes.device.type, torch.bfloat16, enabled=half):
            output = forward(batch["image"])
        loss(output.float(), batch["target"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(args: argparse.Namespace, out: Path) -> dict:
    """Milliseconds a step, the ratio, and how far from the floor."""
    config = deit3(num_images=10 * args.batch, num_classes=NUM_CLASSES, size=args.size, num_registers=args.registers)
    config = dataclasses.replace(
        config,
        batch_size=args.batch,
        num_steps=10**6,
        drop_path=0.0,
        precision=args.precision,
        compile=args.compile,
        optimizer=dataclasses.replace(config.optimizer, lr=1e-6, warmup_steps=0),
    )
    processes = Processes.join()
    torch.manual_seed(0)
    batch = {"image": torch.randn(args.batch, 3, 224, 224), "target": torch.rand(args.batch, NUM_CLASSES).gt(0.99).float()}
    batch = {name: rows.to(processes.device) for name, rows in batch.items()}
    training = Training.on_batches(config, RunFolder(out), itertools.repeat((batch, [])), processes)
    times = interleaved({"ours": training.advance, "timm": plain_loop(training, batch, args.compile)}, args.repeats)
    middle = sorted(times["ours"])[args.repeats // 2]
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    flops = 3 * forward_flops(config.model, config.model.grid, args.batch)
    return {
        "size": args.size,
        "registers": args.registers,
        "batch": args.batch,
        "precision": args.precision,
        "compiled": args.compile,
        "milliseconds": 1e3 * middle,
        "images_per_second": args.batch / middle,
        "to_timm": median_ratio(times["ours"], times["timm"]),
        "ratios": sorted(a / b for a, b in zip(times["ours"], times["timm"], strict=True)),
        "share_of_matrix_rate": flops / middle / matrix_rate(dtype, processes.device.type),
    }
