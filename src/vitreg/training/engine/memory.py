"""What to say when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def out_of_memory(images: int) -> Iterator[None]:
    """Turns running out of memory into a sentence.

    Args:
        images: of which a process computes so many at a time.

    Raises:
        ValueError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = " ".join(str(error).split())
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in message.lower() for words in _WORDS):
            raise
        raise ValueError(
            f"out of memory with {images} images at a time ({message[:200]}); choose a smaller --batch-size, a "
            f"larger --accumulation, --gradient-checkpointing, --sharding fsdp, a smaller --arch or fewer --workers"
        ) from error
