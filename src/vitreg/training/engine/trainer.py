"""The training loop: one for all recipes."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

from vitreg.images import ImageSet
from vitreg.training.data.samples import SampleStream, fetch
from vitreg.training.engine.config import TrainingConfig
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.held_out_diagnosis import HeldOutDiagnosis
from vitreg.training.engine.run_folder import RunFolder
from vitreg.training.engine.run_logger import RunLogger, not_finite
from vitreg.training.engine.snapshots import last_good, latest_snapshot, load_snapshot, save_snapshot
from vitreg.training.engine.train_state import Product, TrainState

OnLog = Callable[[dict[str, Any]], None]
"""Called on the first process, every `log_every` steps, with what is logged; and with what is diagnosed."""


class Trainer:
    """A run in progress, in a folder that has been created; `held_out` images are diagnosed and evaluated on.

    Raises:
        ValueError: the images do not suit the recipe, or the batch cannot be shared out.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        images: ImageSet,
        held_out: ImageSet,
        processes: Distributed,
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
            raise ValueError(f"{images.source} has {len(images)} images, fewer than a batch of {config.batch_size}")
        self.config, self.folder, self.processes = config, folder, processes
        self._num_workers = num_workers
        self.stream = SampleStream(images, config.method.augmentation(config.model, images), config.seed)
        self.logger = RunLogger(config, folder, processes, on_log)
        self.state = TrainState(config, processes)
        self.held_out_diagnosis = HeldOutDiagnosis(config, held_out, processes.device)
        processes.on_rank_zero(self.held_out_diagnosis.read)
        self._stopped = False

    def restore(self) -> None:
        """Go back to the last checkpoint; to the start where there is none.

        Raises:
            ValueError: the checkpoint is damaged or of another model.
        """
        if (snapshot := latest_snapshot(self.folder.checkpoints)) is not None:
            load_snapshot(snapshot, self.state)
        self.processes.on_rank_zero(lambda: self.folder.forget_after(self.state.step))

    def run(self) -> bool:
        """Train to the end; False where it was interrupted, after a checkpoint.

        Raises:
            ValueError: the loss is not a number, memory or disk is full, image after image cannot be read.
        """
        config, state = self.config, self.state
        fetched = fetch(
            self.stream,
            self.processes,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            steps=range(state.step, config.num_steps),
            num_workers=self._num_workers,
        )
        with self._interruptible(), contextlib.closing(fetched), self.logger.open(state.step):
            while state.step < config.num_steps:
                batches = []
                for batch, skipped in itertools.islice(fetched, config.accumulation):
                    self.logger.skip(skipped)
                    batches.append(batch)
                logged = state.advance(batches)
                self.logger.note(state.step, logged)
                if self._pause():
                    return False
        return True

    def _pause(self) -> bool:
        """What is due after a step; returns whether to stop before the end."""
        step, config = self.state.step, self.config
        done = step == config.num_steps
        saved = done or step % config.checkpoint_every == 0
        watched = done or (config.diagnose_every > 0 and step % config.diagnose_every == 0)
        stop = False
        # Processes have to agree on stopping, so several of them do it where they meet anyway.
        if saved or watched or step % config.log_every == 0 or (self._stopped and self.processes.world == 1):
            stop = self.logger.flush(self._stopped)
        if watched or saved or stop:
            if not self.state.is_finite():
                raise not_finite(f"weights are not finite after step {step}", self.folder)
            product = self.state.export_model()
            self.processes.on_rank_zero(lambda: self._write(product, watched, saved or stop))
            if saved or stop:
                # After the model, so that a run that is killed in between goes on from the checkpoint before: after the
                # last one nothing would write the model.
                save_snapshot(self.folder.checkpoints, self.state)
        return stop and not done

    def _write(self, product: Product | None, watched: bool, saved: bool) -> None:
        """Look at held-out images and note what is seen; save the model as it is."""
        assert product is not None
        step, method = self.state.step, self.state.method
        if watched:
            try:
                found = self.held_out_diagnosis.look(method, *product, final=step == self.config.num_steps)
            except ValueError as error:
                kept = last_good(self.folder.checkpoints)
                raise ValueError(f"cannot diagnose step {step}: {error}; {kept}") from error
            self.logger.diagnosed(step, found)
        if saved:
            self.logger.save(method, *product)

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
