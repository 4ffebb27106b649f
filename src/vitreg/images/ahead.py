"""Work that background threads do ahead of time, such as decoding while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Event
from typing import TypeVar

from vitreg.common.devices import available_cores

# A thread takes several items at a time, so that handing over costs little beside decoding.
_CHUNK = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    ahead: int,
    num_threads: int | None = None,
    in_bursts: bool = False,
) -> Generator[Result, None, None]:
    """`map(function, items)`, in order, computed in threads before it is asked for.

    Threads end with the iteration; close the generator where it is left early.

    Args:
        function: called in the threads.
        items: taken as they are needed.
        ahead: results that may wait to be taken; a few more where there are many threads.
        num_threads: by default one for each core this process may use, at most 8.
        in_bursts: compute `ahead` results when the first of them is asked for, and nothing until the last is taken.
            For a caller that uses every core itself meanwhile, in steps that all of its threads must finish: a core
            that is lent to another thread would leave the others waiting.
    """
    remaining = iter(items)
    stop = Event()
    size = max(1, min(_CHUNK, ahead // 2))
    num_threads = num_threads or min(8, available_cores())
    num_chunks = max(num_threads, -(-ahead // size))

    def compute(chunk: list[Item]) -> list[Result]:
        computed: list[Result] = []
        for item in chunk:
            if stop.is_set():
                break
            computed.append(function(item))
        return computed

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vitreg-images")
    pending: deque[Future[list[Result]]] = deque()
    try:
        while True:
            if not (pending and in_bursts):
                while len(pending) < num_chunks and (chunk := list(islice(remaining, size))):
                    pending.append(pool.submit(compute, chunk))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
