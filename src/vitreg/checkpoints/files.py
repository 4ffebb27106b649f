"""Weights from files, never running code from them."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitreg.checkpoints import registry
from vitreg.checkpoints.state import CheckpointError

StateDict = dict[str, Tensor]
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def read_weights(path: Path) -> tuple[StateDict, dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file, or tensors of a `.pth`, `.pt`, `.bin` or `.ckpt` file.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or a pickle of more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give a .safetensors or .pth file, or a model name")
    if path.suffix == ".npz":
        name = registry.of_official_file(path.stem) or "vit_base_patch16_224.augreg_in21k"
        raise CheckpointError(f"{path} holds JAX's arrays, which vitreg does not read; load timm's conversion, {name}")
    return _safetensors(path) if path.suffix == ".safetensors" else (_torch(path), {})


def is_vitreg_file(path: Path) -> bool:
    """Whether a file is there that `save` wrote in vitreg's own format."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == "vitreg"
    except (SafetensorError, OSError):
        return False


def _safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); download it again") from error


def _torch(path: Path) -> StateDict:
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip archive or a pickle, as torch writes them
            raise CheckpointError(f"{path} is no PyTorch checkpoint, but text or another format; download it again")
    try:
        if zipfile.is_zipfile(path) and _holds_code(path):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which holds code besides tensors; refused. Where you trust it, save "
                f"torch.jit.load(...).state_dict() as .safetensors and load that; OpenAI's CLIPs are also "
                f"{', '.join(model.name for model in registry.list_models('*.openai'))}"
            )
        # Training scripts of DINO, DeiT and MAE store their parsed arguments beside the weights: plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "weights only" in str(error).lower():
            raise CheckpointError(
                f"{path} holds Python objects besides tensors, which could run code when loaded; refused. "
                f"Save its state_dict as .safetensors where it was made, and load that"
            ) from error
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or damaged; download it again") from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint; download it again") from error
    return unwrap(content, str(path))


def _holds_code(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def unwrap(content: Any, source: str) -> StateDict:
    """The weights inside what training scripts save: `{"model": ...}`, `module.` and `backbone.` prefixes.

    Raises:
        CheckpointError: there is no state dict inside.
    """
    while isinstance(content, dict):
        inner = next(
            (k for k in ("model_ema", "teacher", "model", "state_dict") if isinstance(content.get(k), dict)),
            None,
        )
        if inner is None:
            break
        content = content[inner]
    tensors = {}
    if isinstance(content, dict):
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{source} holds no state dict (a mapping of names to tensors)")
    for prefix in ("module.", "_orig_mod.", "backbone."):
        if any(key.startswith(prefix) for key in tensors):
            # Beside the backbone lie heads of self-supervised training, which are not part of the ViT.
            keep_only = prefix == "backbone."
            tensors = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix) or not keep_only
            }
    return tensors
