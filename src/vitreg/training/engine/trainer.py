"""The training loop: one for all recipes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from vitreg.images import ImageSet
from vitreg.training.engine.config import TrainingConfig
from vitreg.training.engine.run_logger import Journal, not_finite
from vitreg.training.engine.train_state import Learner, Product
from vitreg.training.engine.distributed import Processes
from vitreg.training.engine.run_folder import RunFolder
from vitreg.training.data.samples import SampleStream, fetch, worker_deaths
from vitreg.training.engine.snapshots import last_good, latest_snapshot, load_snapshot, save_snapshot
from vitreg.training.engine.held_out_diagnosis import Watch

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
        self.journal = Journal(config, folder, processes, on_log)
        self.learner = Learner(config, processes)
        self.watch = Watch(config, held_out, processes.device)
        processes.on_first(lambda: self.watch.read(config.model.preprocess))
        self._stopped = False

    def restore(self) -> None:
        """Go back to the last checkpoint; to the start where there is none.

        Raises:
            ValueError: the checkpoint is damaged or of another model.
        """
        if (snapshot := latest_snapshot(self.folder.checkpoints)) is not None:
            load_snapshot(snapshot, self.learner)
        self.processes.on_first(lambda: self.folder.forget_after(self.learner.step))

    def run(self) -> bool:
        """Train to the end; False where it was interrupted, after a checkpoint.

        Raises:
            ValueError: the loss is not a number, memory or disk is full, picture after picture cannot be read.
        """
        config, learner = self.config, self.learner
        fetched = fetch(
            self.stream,
            self.processes,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            steps=range(learner.step, config.num_steps),
            num_workers=self._num_workers,
        )
        with self._interruptible(), worker_deaths(), contextlib.closing(fetched), self.journal.open(learner.step):
            while learner.step < config.num_steps:
                batches = []
                for _ in range(config.accumulation):
                    batch, skipped = next(fetched)
                    self.journal.skip(skipped)
                    batches.append(batch)
                logged = learner.advance(batches)
                self.journal.note(learner.step, logged)
                if self._pause():
                    return False
        return True

    def _pause(self) -> bool:
        """What is due after a step; returns whether to stop before the end."""
        step, config = self.learner.step, self.config
        done = step == config.num_steps
        saved = done or step % config.checkpoint_every == 0
        watched = done or (config.diagnose_every > 0 and step % config.diagnose_every == 0)
        stop = False
        # Processes have to agree on stopping, so several of them do it where they meet anyway.
        if saved or watched or step % config.log_every == 0 or (self._stopped and self.processes.world == 1):
            stop = self.journal.flush(self._stopped)
        if watched or saved or stop:
            if not self.learner.is_finite():
                raise not_finite(f"weights are not finite after step {step}", self.folder)
            product = self.learner.product()
            if watched:
                self.diagnose(product)
            if saved or stop:
                self.checkpoint(product)
        return stop and not done

    def checkpoint(self, product: Product | None) -> None:
        """Write the model as it is, and what resuming needs.

        In this order, so that a run that is killed in between goes on from before: after the last checkpoint nothing
        would write the model.

        Raises:
            ValueError: they cannot be written.
        """

        def save() -> None:
            assert product is not None
            self.journal.save(self.learner.method, *product)

        self.processes.on_first(save)
        save_snapshot(self.folder.checkpoints, self.learner)

    def diagnose(self, product: Product | None) -> None:
        """Look at held-out pictures and note what is seen.

        Raises:
            ValueError: the model's tokens are not finite, or what is seen cannot be written.
        """
        step = self.learner.step

        def look() -> None:
            assert product is not None
            vit, companions = product
            vit.to(self.processes.device)
            try:
                found = self.watch.look(self.learner.method, vit, companions, final=step == self.config.num_steps)
            except ValueError as error:
                raise ValueError(
                    f"cannot diagnose step {step}: {error}; {last_good(self.folder.checkpoints)}"
                ) from error
            vit.cpu()
            self.journal.diagnosed(step, found)

        self.processes.on_first(look)

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
