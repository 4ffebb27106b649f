"""Models to files: vitreg's own format, timm's and transformers'."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from vitreg.checkpoints.state import CheckpointError
from vitreg.checkpoints.to_timm import to_timm_state
from vitreg.checkpoints.to_transformers import to_transformers_folder
from vitreg.common.disk import replacing, replacing_files
from vitreg.model import VisionTransformer, ViTConfig

__all__ = ["Format", "config_from_metadata", "save", "to_timm_state"]

Format = Literal["vitreg", "timm", "transformers"]


def save(vit: VisionTransformer, path: str | os.PathLike[str], format: Format = "vitreg") -> None:
    """Write a model, registers included.

    At the checkpoint's own image size the written model gives the same tokens; at other sizes the other
    library resizes positions by its own rule. CLIP in transformers returns tokens from before the last norm.

    Args:
        vit: the model.
        path: a `.safetensors` file; for `"transformers"` a folder.
        format: `"vitreg"` keeps everything; `"timm"` loads into timm's own class, with the architecture and
            the keyword arguments in the file's metadata; `"transformers"` is what `from_pretrained` reads.

    Raises:
        CheckpointError: the format cannot express the model.
        ValueError: the file cannot be written; no part of it is left.
    """
    path = Path(path)
    if vit.config.register_neurons and format in ("timm", "transformers"):
        raise CheckpointError(
            f"format {format!r} cannot express test-time registers, to which activations are moved inside the MLPs; "
            f"save with format='vitreg'. vitreg.install_registers runs them inside a model of timm, transformers or "
            f"open_clip, and vitreg.export writes them as ONNX"
        )
    if format == "transformers":
        with replacing_files(path) as folder:
            to_transformers_folder(vit, folder)
        return
    if format not in ("vitreg", "timm"):
        raise CheckpointError(f"format {format!r} is unknown; choose vitreg, timm or transformers")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors for format {format!r}")
    if format == "vitreg":
        state, metadata = vit.state_dict(), {"config": json.dumps(vit.config.to_dict())}
    else:
        state, kwargs = to_timm_state(vit)
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in kwargs.items()}
        metadata |= {"mean": json.dumps(vit.preprocess.mean), "std": json.dumps(vit.preprocess.std)}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": format, **metadata})


def config_from_metadata(metadata: Mapping[str, str] | None) -> ViTConfig | None:
    """The config in the metadata of a file that `save` wrote in vitreg's format; None for other files.

    Raises:
        CheckpointError: the config is damaged or from a newer vitreg.
    """
    if not metadata or metadata.get("format") != "vitreg":
        return None
    try:
        return ViTConfig.from_dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the file's vitreg config cannot be read: {error}") from error
