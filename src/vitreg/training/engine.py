"""The training loop: one for all recipes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vitreg.checkpoints.state import build
from vitreg.images import ImageSet
from vitreg.model import VisionTransformer
from vitreg.training.average import Average
from vitreg.training.config import TrainingConfig
from vitreg.training.journal import Journal, not_finite
from vitreg.training.memory import out_of_memory
from vitreg.training.method import Batch, Companions, Method
from vitreg.training.optimizer import build_optimizer, set_schedules
from vitreg.training.processes import Processes, distribute, local, whole
from vitreg.training.randomness import fixed_randomness, seed_step
from vitreg.training.run_folder import RunFolder
from vitreg.training.samples import SampleStream, fetch, worker_deaths
from vitreg.training.snapshots import last_good, latest_snapshot, load_snapshot, save_snapshot
from vitreg.training.stochastic_depth import add_stochastic_depth
from vitreg.training.watch import Watch

OnLog = Callable[[dict[str, Any]], None]
"""Called on the first process, every `log_every` steps, with what is logged; and with what is diagnosed."""


class Training:
    """A run in progress.

    Args:
        config: what to do.
        folder: where the run is kept; it has been created.
        images: to train on.
        held_out: to diagnose and evaluate on.
        processes: who takes part.
        num_workers: decoding processes beside each.
        on_log: what to tell.

    Raises:
        ValueError: the pictures do not suit the recipe, or the batch cannot be shared out.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        images: ImageSet,
        held_out: ImageSet,
        processes: Processes,
        *,
        num_workers: int,
        on_log: OnLog | None = None,
    ) -> None:
        parts = processes.world * config.accumulation
        if config.batch_size % (2 * parts):
            raise ValueError(
                f"batch size {config.batch_size} cannot be shared out evenly, in pairs, over {processes.world} "
                f"processes x {config.accumulation} micro-batches; choose a multiple of {2 * parts}"
            )
        if len(images) < config.batch_size:
            raise ValueError(f"{images.source} has {len(images)} pictures, fewer than a batch of {config.batch_size}")
        self.config, self.folder, self.processes = config, folder, processes
        self._num_workers = num_workers
        self.stream = SampleStream(images, config.method.views(config.model, images), config.seed)
        with fixed_randomness(config.seed):
            self.method: Method = config.method.build(config.model)
        if config.ema_decay and (self.method.product is not self.method.vit or self.method.companions()):
            raise ValueError(
                f"ema_decay is for models that are saved alone, without a teacher; leave it 0 for {config.recipe}"
            )
        add_stochastic_depth(self.method.vit, config.drop_path, processes)
        self.method.vit.gradient_checkpointing = config.gradient_checkpointing
        self.journal = Journal(config, folder, processes, self.method, self.stream, on_log)
        self.method.to(processes.device).train()
        if config.compile:
            for block in self.method.vit.blocks:
                block.compile()
        self.model = distribute(self.method, processes, config.sharding, config.precision)
        self.optimizer = build_optimizer(self.method, config.optimizer)
        self.average = Average(self.method.vit, config.ema_decay) if config.ema_decay else None
        self.watch = Watch(config, held_out, processes.device)
        processes.on_first(lambda: self.watch.read(config.model.preprocess))
        self.step = 0
        self._stopped = False

    def restore(self) -> None:
        """Go back to the last checkpoint; to the start where there is none.

        Raises:
            ValueError: the checkpoint is damaged or of another model.
        """
        if (snapshot := latest_snapshot(self.folder.checkpoints)) is not None:
            self.step = load_snapshot(snapshot, self.method, self.optimizer, self.average, self.processes)
        self.processes.on_first(lambda: self.folder.forget_after(self.step))

    def run(self) -> bool:
        """Train to the end; False where it was interrupted, after a checkpoint.

        Raises:
            ValueError: the loss is not a number, memory or disk is full, picture after picture cannot be read.
        """
        config = self.config
        batches = fetch(
            self.stream,
            self.processes,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            steps=range(self.step, config.num_steps),
            num_workers=self._num_workers,
        )
        with self._interruptible(), worker_deaths(), contextlib.closing(batches), self.journal.open(self.step):
            while self.step < config.num_steps:
                self._advance(batches)
                done = self.step == config.num_steps
                saved = done or self.step % config.checkpoint_every == 0
                watched = done or (config.diagnose_every > 0 and self.step % config.diagnose_every == 0)
                stop = False
                if saved or watched or self.step % config.log_every == 0 or (self._stopped and self._alone):
                    stop = self.journal.flush(self._stopped)
                if watched or saved or stop:
                    self._check_weights()
                if watched:
                    self.diagnose()
                if saved or stop:
                    self.checkpoint()
                if stop and not done:
                    return False
        return True

    @property
    def _alone(self) -> bool:
        return self.processes.world == 1

    def _advance(self, batches: Iterator[tuple[Batch, list[str]]]) -> None:
        """One optimizer step."""
        config = self.config
        progress = self.step / config.num_steps
        rate = set_schedules(self.optimizer, config.optimizer, self.step, config.num_steps)
        logged: dict[str, Tensor] = {}
        batch: Batch = {}
        for micro in range(config.accumulation):
            batch, skipped = next(batches)
            self.journal.skip(skipped)
            batch = {name: rows.to(self.processes.device, non_blocking=True) for name, rows in batch.items()}
            with self._out_of_memory(batch):
                for name, value in self._backward(batch, micro, progress).items():
                    logged[name] = logged.get(name, 0) + value / config.accumulation
        if config.optimizer.clip_norm is not None:
            trained = [p for p in self.method.parameters() if p.grad is not None]
            logged["gradient_norm"] = whole(torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm))
        with self._out_of_memory(batch):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.method.after_step(self.step / config.num_steps)
        if self.average is not None:
            self.average.update(self.method.vit, self.step)
        self.journal.note(self.step, rate, logged)

    def _backward(self, batch: Batch, micro: int, progress: float) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch; gradients meet those of other processes with the last."""
        config, last = self.config, micro == self.config.accumulation - 1
        seed_step(config.seed, self.step, micro)
        later = contextlib.nullcontext()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            later = self.model.no_sync()
        half = config.precision == "bfloat16"
        with later:
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=half):
                values = self.model(batch, progress)
            (values["loss"] / config.accumulation).backward()
        return {name: value.detach() for name, value in values.items()}

    def _out_of_memory(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        return out_of_memory(self.method, self.optimizer, batch, self.config, self.processes)

    def _check_weights(self) -> None:
        bad = sum((~torch.isfinite(local(p))).any().float() for p in self.method.parameters())
        if self.processes.mean(torch.as_tensor(bad)):
            raise not_finite(f"weights are not finite after step {self.step}", self.folder)

    def checkpoint(self) -> None:
        """Write the model as it is, and what resuming needs.

        In this order, so that a run that is killed in between goes on from before: after the last checkpoint nothing
        would write the model.

        Raises:
            ValueError: they cannot be written.
        """
        vit, companions = self.product()
        self.processes.on_first(lambda: self.journal.save(self.method, vit, companions))
        save_snapshot(self.folder.checkpoints, self.step, self.method, self.optimizer, self.average, self.processes)

    def diagnose(self) -> None:
        """Look at held-out pictures and note what is seen.

        Raises:
            ValueError: the model's tokens are not finite, or what is seen cannot be written.
        """
        vit, companions = self.product()
        final = self.step == self.config.num_steps

        def look() -> None:
            try:
                found = self.watch.look(self.method, vit, companions, final=final)
            except ValueError as error:
                kept = last_good(self.folder.checkpoints)
                raise ValueError(f"cannot diagnose step {self.step}: {error}; {kept}") from error
            self.journal.diagnosed(self.step, found)

        self.processes.on_first(look)

    def product(self) -> tuple[VisionTransformer, Companions]:
        """The model as it would be saved, and what goes with it; every process has to ask."""
        state = _state(self.method.product)
        if self.average is not None:
            state |= self.average.state()
        vit = build(self.config.model, state, "the model in training").to(self.processes.device)
        companions = {name: _state(module) for name, module in self.method.companions().items()}
        return vit.requires_grad_(False), companions

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and termination end the run after the step, with a checkpoint; a second one ends it at once."""

        def stop(*_: object) -> None:
            if self._stopped:
                raise KeyboardInterrupt
            self._stopped = True

        try:
            before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread can be interrupted
            before = {}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module, gathered."""
    return {name: whole(tensor).detach() for name, tensor in module.state_dict().items()}
