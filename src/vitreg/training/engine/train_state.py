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
from vitreg.training.engine.distributed import Distributed, distribute, full_tensor, local_tensor
from vitreg.training.engine.ema import WeightEma
from vitreg.training.engine.method import Batch, ExtraModules, Method
from vitreg.training.engine.optimizer import build_optimizer, set_schedules
from vitreg.training.engine.randomness import fixed_randomness, seed_step
from vitreg.training.engine.stochastic_depth import add_stochastic_depth

Product = tuple[VisionTransformer, ExtraModules]
"""A model, and the weights of what is saved beside it."""


class TrainState:
    """The method, spread over the processes, its optimizer and its averaged weights.

    Args:
        config: of the run.
        processes: who takes part.

    Attributes:
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
        _start_layer_scale(self.method, config.layer_scale)
        add_stochastic_depth(self.method.vit, config.drop_path, processes)
        self.method.vit.gradient_checkpointing = config.gradient_checkpointing
        self.method.to(processes.device).train()
        for block in _blocks(self.method) if config.compile else ():
            block.compile()
        self.model = distribute(self.method, processes, config.sharding, config.half)
        self.optimizer = build_optimizer(self.method, config.optimizer)
        self.ema = WeightEma(self.method.vit, config.ema_decay) if config.ema_decay else None
        self.step = 0

    def advance(self, batches: Iterable[Batch]) -> dict[str, Tensor | float]:
        """One optimizer step.

        Args:
            batches: this process's micro-batches of the step.

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
        if self.ema is not None:
            self.ema.update(self.method.vit, self.step)
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
        state = self.method.export_model.state_dict() | ({} if self.ema is None else self.ema.tensors)
        modules = self.method.extra_modules().items()
        gathered = self.processes.gather(state)
        extra_modules = {name: self.processes.gather(module.state_dict()) for name, module in modules}
        if not self.processes.is_rank_zero:
            return None
        return build(self.config.model, gathered, "the model in training").requires_grad_(False), extra_modules


@torch.no_grad()
def _start_layer_scale(method: nn.Module, value: float) -> None:
    """In a teacher, too, which is to start as the student does."""
    for block in _blocks(method):
        for scale in (block.ls1, block.ls2):
            if scale is not None:
                scale.fill_(value)


def _blocks(method: nn.Module) -> list[Block]:
    """A teacher's, too."""
    return [module for module in method.modules() if isinstance(module, Block)]
