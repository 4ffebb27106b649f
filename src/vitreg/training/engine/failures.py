"""What to say when memory, a worker or another process is gone, which PyTorch raises anywhere as a `RuntimeError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def failures_in_words(num_images: int) -> Iterator[None]:
    """Turns these failures into sentences.

    Args:
        num_images: how many a process computes at a time.

    Raises:
        ValueError: memory ran out, a process that decodes images died, or another one that trains is gone.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = " ".join(str(error).split())
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        memory = memory or any(words in message.lower() for words in OUT_OF_MEMORY)
        if "DataLoader worker (pid" in message:
            died = message.split(". ")[0]
            words = f"a process that decodes images died ({died}); resume the run with fewer --workers"
        elif memory:
            words = (
                f"out of memory with {num_images} images at a time ({message[:200]}); choose a smaller --batch-size, a "
                f"larger --accumulation, --gradient-checkpointing, --sharding fsdp, a smaller --arch or fewer --workers"
            )
        elif dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in message):
            words = f"process {dist.get_rank()} stops, because another one is gone; go on with --resume"
        else:
            raise
        raise ValueError(words) from error
