"""Shared by the benchmarks: interleaved timing, floors, and what machine this is."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from vitreg.common.devices import resolve_device


def default_device() -> str:
    """A GPU where there is one."""
    return str(resolve_device())


def machine(device: str = "auto") -> str:
    if resolve_device(device).type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def synchronize() -> None:
    """Wait for a GPU's work; a CPU's is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    synchronize()
    start = clock()
    run()
    synchronize()
    return clock() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every repeat; the order rotates, so that no run profits from its place.

    With `time.process_time` as the clock, they are of core time: what a shared machine can measure, if
    OMP_NUM_THREADS=1 keeps threads from spinning while they wait.
    """
    names = list(runs)
    for name in names * 2:
        runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(seconds(runs[name], clock))
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of runs made side by side."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product through PyTorch: the ceiling for everything here."""
    side = 8192 if torch.device(device).type == "cuda" else 1536
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    times = interleaved({"matmul": lambda: a @ b}, 9)["matmul"]
    return 2 * side**3 / statistics.median(times)
