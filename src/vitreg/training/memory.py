"""What to say when memory runs out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from vitreg.training.config import TrainingConfig
from vitreg.training.method import Batch, Method
from vitreg.training.processes import Processes


@contextlib.contextmanager
def out_of_memory(method: Method, batch: Batch, config: TrainingConfig, processes: Processes) -> Iterator[None]:
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
    size = len(next(iter(batch.values())))
    parts = processes.world * config.accumulation
    what = f"out of memory with {size} pictures at a time (batch size {config.batch_size})"
    if processes.world > 1:  # others would wait in vain for this process to take part in what a trial communicates
        raise ValueError(f"{what}; choose a smaller --batch-size, a larger --accumulation, or --sharding fsdp")
    fits = _largest_fit(method, batch, config, size)
    if not fits:
        raise ValueError(f"{what}, and not even 2 would fit; choose a smaller model or --gradient-checkpointing")
    raise ValueError(
        f"{what}; the largest that would fit is {fits}: choose --batch-size {fits * parts}, or a larger --accumulation"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    told = "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _largest_fit(method: Method, batch: Batch, config: TrainingConfig, failed: int) -> int:
    """The largest even number of pictures below `failed` whose forward and backward pass fits; 0 for none."""
    fits, fails = 0, failed
    while fails - fits > 2:
        size = max(2, (fits + fails) // 4 * 2)
        method.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            device = next(iter(batch.values())).device.type
            with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = method({name: rows[:size] for name, rows in batch.items()}, 0.0)["loss"]
            loss.backward()
            del loss
            fits = size
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            fails = size
        if fits == size and fails - fits <= 2:
            break
    return fits
