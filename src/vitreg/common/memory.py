"""What the allocator of the C library does with memory that is free again."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 2**28, 2**25


def keep_freed_memory() -> None:
    """Let this process keep up to 256 MB that is free instead of giving it back, in blocks of up to 32 MB.

    By default glibc gives the top of its heap back after a forward pass on a CPU, and for the next one the kernel
    fills all of that with zeros again, which takes up to 7 % of the pass. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)  # which glibc no longer adapts by itself once the other is set
