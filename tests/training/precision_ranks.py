"""Twenty steps in bfloat16, by DDP and by FSDP2; its own file, because processes import what they run."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from training.captioned import CONFIG, MODEL
from training.contrastive_ranks import random_batch as captioned
from training.distillation_steps import random_batch as crops
from training.distillation_steps import small_method
from vitreg.training import TrainingConfig, clip, dinov2
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.method import Batch
from vitreg.training.engine.train_state import TrainState
from vitreg.training.recipes.multi_crop import locate_hidden

STEPS = 20


def small_config(recipe: str, sharding: str) -> TrainingConfig:
    if recipe == "clip":
        config, model, method = clip(num_images=8, batch_size=8), MODEL, CONFIG
    else:
        config, distillation = dinov2(num_images=8, batch_size=8), small_method()
        model, method = distillation.vit.config, dataclasses.replace(distillation.config, frozen_prototypes=0.0)
    optimizer = dataclasses.replace(config.optimizer, lr=1e-3, warmup_steps=0)
    changes = {"model": model, "method": method, "optimizer": optimizer, "num_steps": STEPS, "sharding": sharding}
    return dataclasses.replace(config, **changes, dtype="bfloat16", drop_path=0.0, layer_scale=0.1)


def run(rank: int, world: int, folder: Path) -> None:
    """What came of the steps, written down by the first process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    processes = Distributed(rank, world, torch.device("cpu"))
    for recipe, make in (("clip", captioned), ("dinov2", crops)):
        batch = {name: rows.chunk(world)[rank] for name, rows in make(8).items() if "hidden" not in name}
        if recipe == "dinov2":
            batch |= locate_hidden(batch["mask"])
        for sharding in ("ddp", "fsdp"):
            take_steps(recipe, sharding, batch, processes, folder)
    # Models hold on to the group, whose threads may not outlive it.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def take_steps(recipe: str, sharding: str, batch: Batch, processes: Distributed, folder: Path) -> None:
    train_state = TrainState(small_config(recipe, sharding), processes)
    vit, seen = train_state.method.vit, {}

    def look(norm: nn.Module, inputs: tuple) -> None:
        seen.setdefault("tokens", inputs[0].detach().clone())
        seen.setdefault("registers", vit.registers.dtype)
        seen.setdefault("matrices", vit.blocks[0].attn.qkv.weight.dtype)

    vit.blocks[0].norm1.register_forward_pre_hook(look)
    logged = [train_state.advance([batch]) for _ in range(STEPS)]
    product = train_state.export_model()
    if processes.rank:
        assert product is None
        return
    log = {name: [float(step[name]) for step in logged] for name in logged[0]}
    torch.save({**seen, "log": log, "weights": product[0].state_dict()}, folder / f"{recipe}-{sharding}.pt")
