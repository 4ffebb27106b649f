"""What to say when memory runs out."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator

import torch

from vitreg.training.config import TrainingConfig
from vitreg.training.method import Batch, Method
from vitreg.training.processes import Processes


@contextlib.contextmanager
def out_of_memory(
    method: Method, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainingConfig, processes: Processes
) -> Iterator[None]:
    """Turns running out of memory into a sentence that says which batch would fit.

    Raises:
        ValueError: memory ran out.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        # The caller keeps the error while trials run, and the error's frames keep what filled the memory.
        traceback.clear_frames(error.__traceback__)
    size = len(next(iter(batch.values())))
    parts = processes.world * config.accumulation
    what = f"out of memory with {size} pictures at a time (batch size {config.batch_size})"
    if processes.world > 1:  # others would wait in vain for this process to take part in what a trial communicates
        raise ValueError(f"{what}; choose a smaller --batch-size, a larger --accumulation, or --sharding fsdp")
    fits = _largest_fit(method, optimizer, batch, config, size)
    if not fits:
        raise ValueError(f"{what}, and not even 2 would fit; choose a smaller model or --gradient-checkpointing")
    raise ValueError(
        f"{what}; the largest that would fit is {fits}: choose --batch-size {fits * parts}, or a larger --accumulation"
    )


@contextlib.contextmanager
def out_of_memory_elsewhere() -> Iterator[None]:
    """The same for all that does not depend on the batch alone: building the model, reading pictures, a diagnosis.

    Raises:
        ValueError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(
            f"out of memory ({reason}); choose a smaller --size or --batch-size, or fewer --workers"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    told = "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _largest_fit(
    method: Method, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainingConfig, failed: int
) -> int:
    """The largest even number of pictures below `failed` whose forward and backward pass fits; 0 for none."""
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    try:
        # Room for the two moments that the optimizer adds with the first step.
        moments = [torch.empty_like(p) for p in trained for _ in range(2) if not optimizer.state]
    except (RuntimeError, MemoryError):
        return 0
    fits, fails = 0, failed
    while fails - fits > 2:
        size = max(2, (fits + fails) // 4 * 2)
        try:
            _try({name: rows[:size] for name, rows in batch.items()}, method, config)
            fits = size
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            fails = size
    del moments
    return fits


def _try(batch: Batch, method: Method, config: TrainingConfig) -> None:
    method.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    device = next(iter(batch.values())).device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
        loss = method(batch, 0.0)["loss"]
    loss.backward()
