"""What a training run leaves on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vitreg.common.disk import lock, replace_text, unlock, writing

FORMAT = "vitreg-run/1"


class RunFolder:
    """A run's files.

    - `config.json`: everything that decides what the run does, and its data.
    - `log.jsonl`: a line for every step.
    - `diagnosis.jsonl`: a line for every diagnosis on held-out images.
    - `skipped.txt`: images that could not be read, and why.
    - `tensorboard/`: the same curves for TensorBoard, where it is installed.
    - `checkpoints/step-N/`: what resuming needs.
    - `model.safetensors`: the model, for `vitreg.load`; written anew with every checkpoint.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.json"
        self.log = self.path / "log.jsonl"
        self.diagnoses = self.path / "diagnosis.jsonl"
        self.skipped = self.path / "skipped.txt"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model.safetensors"
        self._lock: TextIO | None = None

    def create(self, description: dict[str, Any]) -> None:
        """Make the folder of a new run, and claim it.

        Raises:
            ValueError: it holds a run that did something already, or cannot be written.
        """
        # A run that failed in its first steps, for a batch that is too large for example, may be started again.
        if self.config.exists() and (self.log.exists() or any(self.checkpoints.glob("step-*"))):
            recipe = self.describe().get("recipe")
            raise ValueError(
                f"{self.path} holds a run of {recipe} already; go on with --resume {self.path}, or choose another --out"
            )
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.claim()
        with writing(self.path):
            self.skipped.unlink(missing_ok=True)
            replace_text(self.config, json.dumps({"format": FORMAT, **description}, indent=1))

    def claim(self) -> None:
        """Keep other processes from training in this folder, until this one releases it or ends.

        Raises:
            ValueError: another one trains in it, or it cannot be written.
        """
        self._lock = lock(self.path, "trains in")

    def release(self) -> None:
        """The opposite of `claim`."""
        unlock(self._lock)
        self._lock = None

    def describe(self) -> dict[str, Any]:
        """What `create` was given.

        Raises:
            ValueError: this is no run's folder.
        """
        try:
            description = json.loads(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.path} holds no run (there is no config.json in it); give a run's folder") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.config} cannot be read ({error}); restore it from a copy") from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f"{self.config} is not of a run of vitreg (format {FORMAT}); give a run's folder")
        return description

    def forget_after(self, step: int) -> None:
        """Cut the logs after a step, from which the run goes on."""
        with writing(self.path):
            for path in (self.log, self.diagnoses):
                if path.exists():
                    kept = (line for line in read_lines(path) if line["step"] <= step)
                    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; a last one that was cut off while it was written is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
