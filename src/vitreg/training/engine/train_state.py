"""A model in training with its optimizer: what a step changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vitreg.checkpoints.state import build
from vitreg.model import Block, VisionTransformer
from vitreg.training.engine.config import TrainingConfig
from vitreg.training.engine.distributed import Distributed, distribute, ema_update, full_tensor, local_tensor
from vitreg.training.engine.method import Batch, ExtraModules, Method
from vitreg.training.engine.optimizer import build_optimizer, set_schedules
from vitreg.training.engine.randomness import fixed_randomness, seed_step
from vitreg.training.engine.stochastic_depth import StochasticDepth

Product = tuple[VisionTransformer, ExtraModules]
"""A model, and the weights of what is saved beside it."""


class TrainState:
    """The method, spread over the processes, its optimizer and its averaged weights.

    The average forgets faster in the first steps, by `(1 + step) / (10 + step)`, so that the initial weights do not
    linger (as `tf.train.ExponentialMovingAverage`).

    Attributes:
        method: as the recipe builds it.
        model: the same, wrapped for all processes.
        average: the averaged weights of the model by name, sharded as these; empty without `ema_decay`.
        step: optimizer steps taken.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(self, config: TrainingConfig, processes: Distributed) -> None:
        self.config, self.processes = config, processes
        with fixed_randomness(config.seed):
            self.method: Method = config.method.build(config.model)
        if config.ema_decay and (self.method.export_model is not self.method.vit or self.method.extra_modules()):
            raise ValueError(
                f"ema_decay is for models that are saved alone, without a teacher; leave it 0 for {config.recipe}"
            )
        vit = self.method.vit
        # Both start alike, where the saved one is a teacher; one that was trained already stays as it is.
        for block in {*vit.blocks, *self.method.export_model.blocks}:
            for scale in (block.ls1, block.ls2):
                if isinstance(scale, Tensor):
                    nn.init.constant_(scale, config.layer_scale)
        if config.drop_path:
            vit.stochastic_depth = StochasticDepth(config.drop_path, vit.config.depth, processes)
        vit.gradient_checkpointing = config.gradient_checkpointing
        self.method.to(processes.device).train()
        if config.compile:
            for block in self.method.modules():
                if isinstance(block, Block):
                    block.compile()
        self.model = distribute(self.method, processes, config.sharding, config.half)
        self.optimizer = build_optimizer(self.method, config.optimizer)
        self.average: dict[str, Tensor] = {}
        if config.ema_decay:
            self.average = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}
        self.step = 0

    def advance(self, batches: Iterable[Batch]) -> dict[str, Tensor | float]:
        """One optimizer step on this process's micro-batches.

        Returns:
            What is logged: the method's scalars, on the device, `lr` and, where gradients are clipped, their norm.
        """
        config = self.config
        progress = self.step / config.num_steps
        rate = set_schedules(self.optimizer, config.optimizer, self.step, config.num_steps)
        logged: dict[str, Tensor | float] = {"lr": rate}
        for micro, batch in enumerate(batches):
            batch = {name: rows.to(self.processes.device, non_blocking=True) for name, rows in batch.items()}
            for name, value in self._backward(batch, micro, progress).items():
                logged[name] = logged.get(name, 0) + value / config.accumulation
        if config.optimizer.clip_norm is not None:
            trained = [p for p in self.method.parameters() if p.grad is not None]
            logged["gradient_norm"] = full_tensor(torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.method.after_step(self.step / config.num_steps)
        if self.average:
            momentum = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            ema_update(self.average.values(), self.method.vit.parameters(), momentum)
        return logged

    def _backward(self, batch: Batch, micro: int, progress: float) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch; gradients meet those of other processes with the last."""
        config, last = self.config, micro == self.config.accumulation - 1
        seed_step(config.seed, self.step, micro)
        later = contextlib.nullcontext()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            later = self.model.no_sync()
        with later:
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=config.half):
                values = self.model(batch, progress)
            (values["loss"] / config.accumulation).backward()
        return {name: value.detach() for name, value in values.items()}

    def is_finite(self) -> bool:
        """Whether all weights are numbers; every process has to ask."""
        bad = sum((~torch.isfinite(local_tensor(p))).any().float() for p in self.method.parameters())
        return not self.processes.mean(torch.as_tensor(bad))

    def export_model(self) -> Product | None:
        """The model as it would be saved, on the CPU of the first process; every process has to ask."""
        gathered = self.processes.gather(self.method.export_model.state_dict() | self.average)
        modules = self.method.extra_modules().items()
        extra_modules = {name: self.processes.gather(module.state_dict()) for name, module in modules}
        if not self.processes.is_rank_zero:
            return None
        return build(self.config.model, gathered, "the model in training").requires_grad_(False), extra_modules
