"""Checkpoints to resume from, of any number of processes, which a kill at any moment leaves whole."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from vitreg.common.disk import put_in_place, writing
from vitreg.common.renamed import has_old_names, with_new_names, with_old_names
from vitreg.training.engine.train_state import TrainState


def save_snapshot(folder: Path, train_state: TrainState) -> None:
    """Write `step-N`: first beside it under another name, then renamed, then the older ones are removed.

    Randomness needs no room in it: it follows from the seed and the step.

    Raises:
        ValueError: it cannot be written; the one before is still there.
    """
    final, temporary = folder / f"step-{train_state.step:08d}", folder / f".step-{train_state.step:08d}.partial"
    if final.exists():
        return
    state, processes = _state(train_state), train_state.processes

    def prepare() -> None:
        with writing(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def finish() -> None:
        with writing(folder):
            put_in_place(temporary, final)
        for old in sorted(folder.glob("step-*"))[:-1]:
            shutil.rmtree(old, ignore_errors=True)

    processes.on_rank_zero(prepare)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is a single process
            save(state, checkpoint_id=temporary)
    except (OSError, RuntimeError, CheckpointException) as error:
        if processes.is_rank_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"cannot write a checkpoint into {folder}: {_reason(error)}; {last_good(folder)}") from error
    processes.on_rank_zero(finish)


def load_snapshot(path: Path, train_state: TrainState) -> None:
    """Put a snapshot's state into a new one, on any number of processes.

    Raises:
        ValueError: it is damaged, or of a model of another size.
    """
    state = _state(train_state)
    try:
        stored = list(FileSystemReader(path).read_metadata().state_dict_metadata)
    except Exception as error:  # a pickle, damaged, raises whatever it trips over
        raise ValueError(f"{path} is damaged: its list of tensors cannot be read ({error})") from error
    old = has_old_names(stored)
    state = with_old_names(state) if old else state
    # What would be loaded in part is refused: a model of fewer blocks or registers than the snapshot's.
    wanted = {f"{part}.{name}" for part in ("model", "average") for name in state[part]}
    if more := sorted(name for name in stored if name.startswith(("model.", "average.")) and name not in wanted):
        raise ValueError(f"{path} does not fit this run's model, which has no {more[0]}; restore the run's config.json")
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            load(state, checkpoint_id=path)
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise ValueError(f"{path} does not fit this run's model, or is damaged ({_reason(error)})") from error
    state = with_new_names(state) if old else state
    model, optimizer = state["model"], state["optimizer"]
    set_state_dict(train_state.method, train_state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    train_state.step = int(path.name.removeprefix("step-"))


def latest_snapshot(folder: Path) -> Path | None:
    """The newest whole one."""
    return max(folder.glob("step-*"), default=None)


def last_good(folder: Path) -> str:
    """What is left of a run that failed."""
    last = latest_snapshot(folder)
    return "there is no checkpoint yet" if last is None else f"the last good checkpoint is kept in {last}"


def _reason(error: BaseException) -> str:
    """What went wrong first, without the tracebacks that PyTorch puts into its messages."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    first = error
    while first.__context__ is not None and not isinstance(first, OSError):
        first = first.__context__
    if isinstance(first, OSError) and first.strerror:
        return first.strerror
    return " ".join(str(error).split())[:300]


def _state(train_state: TrainState) -> dict[str, Any]:
    model, optimizer = get_state_dict(train_state.method, train_state.optimizer)
    return {"model": model, "optimizer": optimizer, "average": train_state.average}
