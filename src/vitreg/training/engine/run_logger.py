"""What a run writes down while it goes on: losses, speed, diagnoses, the model."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitreg.checkpoints import save
from vitreg.common.disk import replacing, writing
from vitreg.model import VisionTransformer
from vitreg.training.engine.config import TrainingConfig
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.method import ExtraModules, Method
from vitreg.training.engine.run_folder import RunFolder
from vitreg.training.engine.snapshots import last_good
from vitreg.training.engine.throughput import matrix_rate


class RunLogger:
    """Collects numbers without waiting for the device, and writes them every `log_every` steps."""

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        processes: Distributed,
        on_log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._config, self._folder, self._processes, self._on_log = config, folder, processes, on_log
        rate = matrix_rate(processes.device, getattr(torch, config.dtype))
        self._floor = config.method.flops(config.model, 1 - config.drop_path) / rate
        self._noted: list[tuple[int, dict[str, Tensor | float]]] = []
        self._skipped: set[str] = set()
        self._board: Any = None
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Around the steps after `step`; TensorBoard hides what it was given of them before the run was resumed."""
        if self._processes.is_rank_zero:
            with contextlib.suppress(ImportError), writing(self._folder.path):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._folder.tensorboard), purge_step=step + 1 if step else None)
        self._clock = time.perf_counter()
        try:
            yield
        finally:
            if self._board is not None:
                self._board.close()

    def skip(self, reasons: list[str]) -> None:
        """Remember images that could not be read; each process adds those that it met to the run's list."""
        if new := [reason for reason in dict.fromkeys(reasons) if reason not in self._skipped]:
            self._skipped.update(new)
            with writing(self._folder.path), self._folder.skipped.open("a", encoding="utf-8") as file:
                file.write("".join(f"{' '.join(reason.split())}\n" for reason in new))

    def note(self, step: int, values: dict[str, Tensor | float]) -> None:
        """Keep a step's scalars, where they are."""
        self._noted.append((step, values))

    def flush(self, stopped: bool) -> bool:
        """Write what was noted since the last time; returns whether any process has been told to stop.

        Raises:
            ValueError: a loss, or the norm of the gradients, is not a number.
        """
        names = [name for name, value in self._noted[0][1].items() if isinstance(value, Tensor)]
        scalars = [torch.as_tensor(values[name]).float().reshape(()) for _, values in self._noted for name in names]
        table = self._processes.mean(torch.stack(scalars)).view(-1, len(names)).tolist()
        counts = torch.tensor([float(stopped), float(len(self._skipped))], device=self._processes.device)
        stops, skipped = (self._processes.mean(counts) * self._processes.world).tolist()
        speed = len(self._noted) * self._config.batch_size / (time.perf_counter() - self._clock)
        entries = [
            {"step": step, "images": step * self._config.batch_size, **values, **dict(zip(names, row, strict=True))}
            for (step, values), row in zip(self._noted, table, strict=True)
        ]
        self._noted = []
        bad = next((entry for entry in entries if not all(map(math.isfinite, entry.values()))), None)
        entries = entries if bad is None else entries[: entries.index(bad)]
        if entries and self._processes.is_rank_zero:
            mfu = speed / self._processes.world * self._floor
            entries[-1] |= {"images_per_second": speed, "mfu": mfu, "skipped": round(skipped)}
            self._write(self._folder.log, entries, {})
        if bad is not None:
            name = next(name for name in ("loss", *bad) if not math.isfinite(bad[name]))
            raise not_finite(f"the {name.replace('_', ' ')} is {bad[name]} at step {bad['step']}", self._folder)
        self._clock = time.perf_counter()
        return stops > 0

    def diagnosed(self, step: int, found: dict[str, Any]) -> None:
        """Write down a diagnosis; the time it took does not count as training."""
        entry = {"step": step, "images": step * self._config.batch_size, **found}
        curves = {f"held_out/{name}": value for name, value in found["metrics"].items()}
        for block in found["blocks"]:
            for name in ("median", "p99", "max", "outlier_fraction"):
                curves[f"norms/block{block['block']:02d}/{name}"] = block[name]
        self._write(self._folder.diagnoses, [entry], curves)
        self._clock = time.perf_counter()

    def _write(self, path: Path, entries: list[dict[str, Any]], curves: dict[str, Any]) -> None:
        """Append lines to a file; TensorBoard gets the numbers in them, and what else are `curves`."""
        with writing(self._folder.path):
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            if self._board is not None:
                for entry in entries:
                    for name, value in (entry | curves).items():
                        if isinstance(value, int | float) and name not in ("step", "images"):
                            self._board.add_scalar(name, value, entry["step"])
        if self._on_log is not None:
            self._on_log(entries[-1])

    def save(self, method: Method, vit: VisionTransformer, extra_modules: ExtraModules) -> None:
        """Write the model, and what is trained beside it, each whole or not at all."""
        save(vit, self._folder.model)
        for name, module in method.extra_modules().items():
            tensors = {key: tensor.cpu().contiguous() for key, tensor in extra_modules[name].items()}
            with replacing(self._folder.path / f"{name}.safetensors") as temporary:
                save_file(tensors, temporary, module.metadata)  # pyright: ignore[reportArgumentType]
        self._clock = time.perf_counter()


def not_finite(what: str, folder: RunFolder) -> ValueError:
    """The error for losses or weights that are not finite."""
    advice = "Start again with a lower learning rate, a longer warm-up or float32"
    return ValueError(f"{what}; {last_good(folder.checkpoints)}. {advice}")
