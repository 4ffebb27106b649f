"""`vitreg train` in processes of their own, which tests may kill; they are forked from one that has imported torch."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitreg import cli

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "vitreg.cli",
        "vitreg.training",
        "timm.optim",
        "timm.data.mixup",
        "torch.utils.tensorboard",
        "torch.distributed.fsdp",
    ]
)


def _child(argv: list[str], told: Path, env: dict[str, str], limits: dict[int, int]) -> None:
    import torch

    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of workers, as in a command of its own
    os.setpgid(0, 0)
    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    for kind, limit in limits.items():
        # Of the address space, what is taken already are libraries.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit += used if kind == resource.RLIMIT_AS else 0
        resource.setrlimit(kind, (limit, limit))
    cli.main(argv)


class Run:
    """A command that goes on by itself.

    Args:
        args: of `vitreg`.
        told: file for what it prints.
        env: variables beside those that are there.
        limits: of `resource.setrlimit`; that of the address space counts from what a new process has.
    """

    def __init__(
        self, *args: object, told: Path, env: dict[str, str] | None = None, limits: dict[int, int] | None = None
    ) -> None:
        self._told = told
        values = [str(arg) for arg in args], told, {"OMP_NUM_THREADS": "1", **(env or {})}, limits or {}
        self._process = _CONTEXT.Process(target=_child, args=values)
        self._process.start()

    @property
    def told(self) -> str:
        """What it has printed."""
        return self._told.read_text() if self._told.exists() else ""

    def wait(self, seconds: float = 60) -> int:
        """Its exit status; minus the signal that killed it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running: {self.told}"
        return self._process.exitcode

    def wait_for(self, there: Callable[[], bool], seconds: float = 60) -> None:
        """Until something is there, while it runs."""
        end = time.monotonic() + seconds
        while not there():
            assert self._process.is_alive(), self.told
            assert time.monotonic() < end, self.told
            time.sleep(0.005)

    def send(self, signal: int, *, group: bool = False) -> None:
        """Send a signal, to its worker processes too if `group`."""
        assert self._process.pid is not None
        (os.killpg if group else os.kill)(self._process.pid, signal)


def log(run: Path) -> list[dict[str, Any]]:
    """A run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
