"""What lies between a name and its weights: the folder that is searched first, the network, other libraries' noise."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from vitreg.checkpoints import registry
from vitreg.checkpoints.files import WEIGHT_FILES, is_vitreg_file
from vitreg.checkpoints.state import CheckpointError

FOLDER_VARIABLE = "VITREG_CHECKPOINTS"

REPOSITORY_FILES = ("config.json", "model.safetensors")
"""What a repository of ours has, by the names that `huggingface_hub.PyTorchModelHubMixin` uses."""


class DownloadError(CheckpointError):
    """A checkpoint that could not be had."""


def import_optional(library: str, what: str, extra: str, instead: str = "") -> Any:
    """A library that not everyone has installed.

    Raises:
        CheckpointError: it is missing.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise CheckpointError(f'{what} needs {library}: pip install "vitreg[{extra}]"{instead}') from error


def timm_name(source: str) -> str:
    """A source without the prefixes under which timm's repositories are on the hub."""
    return source.removeprefix("hf-hub:").removeprefix("timm/")


def in_checkpoint_folder(source: str) -> Path | None:
    """The file or transformers folder that `VITREG_CHECKPOINTS` holds for this source under any of its names."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    if not Path(folder).expanduser().is_dir():
        raise CheckpointError(f"{FOLDER_VARIABLE} names {folder}, which is no folder; correct it, or unset it")
    row = registry.find(source)
    names = dict.fromkeys((source, timm_name(source), (row and row.timm) or source))
    for name in names:
        name = name.replace(":", "/")
        for spelling in (name, name.replace("/", "--")):
            path = Path(folder).expanduser() / spelling
            for suffix in WEIGHT_FILES:
                if (file := path.with_name(path.name + suffix)).is_file():
                    return file
            if (path / "config.json").is_file():
                return path
    for file in sorted(Path(folder).expanduser().glob("*")):
        official = registry.of_official_file(file.stem) if file.suffix in WEIGHT_FILES else None
        row = registry.find(official or "")
        if official is not None and not names.keys().isdisjoint((official, row and row.timm)):
            return file
    return None


@contextlib.contextmanager
def downloading(source: str, place: str) -> Iterator[None]:
    """Asks the hub only where its name resolves, keeps libraries quiet, and turns failures into a sentence.

    Args:
        source: what is being loaded.
        place: what a machine without a network needs in the folder of checkpoints.

    Raises:
        DownloadError: it cannot be downloaded.
    """
    try:
        with reachable_hub(), _quiet_root_logger():
            yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = next((line.strip().rstrip(".;") for line in str(error).splitlines() if line.strip()), "")
        raise DownloadError(
            f"could not get {source}: {reason or type(error).__name__}. Without a network, put {place} into the folder "
            f"that {FOLDER_VARIABLE} names"
        ) from error


def vitreg_weights(repository: str) -> Path | None:
    """The weights of a repository or folder in vitreg's own format; None for another's, or where that cannot be asked.

    Raises:
        CheckpointError: it is in our format, but its weights cannot be downloaded.
    """
    config, weights = REPOSITORY_FILES
    if (folder := Path(repository)).is_dir():
        return folder / weights if is_vitreg_file(folder / weights) else None
    from huggingface_hub import hf_hub_download

    try:
        with reachable_hub():
            told = json.loads(Path(hf_hub_download(repository, config)).read_text(encoding="utf-8"))
    except Exception:  # whoever asks next says why
        return None
    if not isinstance(told, dict) or told.get("library_name") != "vitreg":
        return None
    with downloading(repository, f"its {weights} as {repository.replace('/', '--')}.safetensors"):
        return Path(hf_hub_download(repository, weights))


@contextlib.contextmanager
def reachable_hub() -> Iterator[None]:
    """Use only what is cached where the hub's name does not resolve, instead of a minute of retries."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if not proxied:
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, None)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """open_clip logs through the root logger, which gives it a handler for the rest of the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.addHandler(logging.NullHandler())  # with one there, `logging.info` adds none
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers without its report of weights and its bars; what it says elsewhere in the process stays as it is."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
