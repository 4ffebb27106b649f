"""transformers' `preprocessor_config.json`, read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitreg.checkpoints.state import CheckpointError
from vitreg.model import Preprocess
from vitreg.model.preprocess import Crop, Interpolation

# Pillow's numbers of its filters.
FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def preprocess_from_processor(config: Mapping[str, Any], patch_size: int) -> Preprocess:
    """The preprocessing that a `preprocessor_config.json` describes.

    Args:
        config: of an image processor: `size`, `crop_size`, `do_center_crop`, `resample`, `image_mean`,
            `image_std`.
        patch_size: of the model.

    Raises:
        CheckpointError: it asks for something that `Preprocess` cannot do; the message names it.
    """
    if not config.get("do_resize", True):
        raise _unknown_processor("do_resize", False)
    factor = config.get("rescale_factor", 1 / 255)
    if not (config.get("do_rescale", True) and math.isclose(factor, 1 / 255, rel_tol=1e-4)):
        raise _unknown_processor("rescale_factor", factor)
    mean, std = config.get("image_mean"), config.get("image_std")
    if not config.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        raise _unknown_processor("image_mean and image_std", None)
    if config.get("do_pad", True) and str(config.get("image_processor_type")).startswith(
        ("Owlv2", "Janus")
    ):  # to a square
        raise _unknown_processor("do_pad", True)
    if config.get("resample", 3) not in FILTERS:
        raise _unknown_processor("resample", config["resample"])
    size, crop, crop_pct = _geometry(config)
    multiple = max(config.get("ensure_multiple_of") or 1, patch_size)
    if multiple % patch_size:
        raise _unknown_processor("ensure_multiple_of", multiple)
    return Preprocess(
        size=size,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=FILTERS[config.get("resample", 3)],
        crop_pct=crop_pct,
        crop=crop,
        multiple_of=multiple if crop == "none" else patch_size,
    )


def _geometry(config: Mapping[str, Any]) -> tuple[tuple[int, int], Crop, float]:
    """(height, width) at the end, how it is reached, and the part of the resized image that is kept."""
    center = config.get("do_center_crop", "crop_size" in config)
    size = config.get("size")
    if size is None and "max_num_patches" in config:  # SigLIP 2 NaFlex; a batch needs one size, so the square
        side = math.isqrt(config["max_num_patches"]) * config["patch_size"]
        return (side, side), "squash", 1.0
    if isinstance(size, int):  # transformers before 4.26
        size = {"shortest_edge": size} if center else {"height": size, "width": size}
    if not isinstance(size, Mapping) or set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise _unknown_processor("size", size)
    if config.get("keep_aspect_ratio"):
        # DPT, Depth Anything: the side that changes less; the short one, unless the image is smaller than that.
        if center or "height" not in size or size["height"] != size["width"]:
            raise _unknown_processor("keep_aspect_ratio", True)
        return _height_and_width(size), "none", 1.0
    square = "shortest_edge" in size
    resized = _height_and_width(size["shortest_edge"] if square else size)
    if not center:
        return resized, "none" if square else "squash", 1.0
    crop = config.get("crop_size", 224)
    if isinstance(crop, Mapping) and "height" not in crop:  # BridgeTower
        raise _unknown_processor("crop_size", crop)
    kept = _height_and_width(crop)
    fractions = {keep / full for keep, full in zip(kept, resized, strict=True)}
    if len(fractions) > 1 or max(fractions) > 1:
        raise _unknown_processor("crop_size", config.get("crop_size"))
    fraction = fractions.pop()
    if math.floor(kept[0] / fraction) < resized[0]:  # the quotient of a quotient may round to just below
        fraction = math.nextafter(fraction, 0)
    return kept, "center" if square else "squash", fraction


def _height_and_width(size: Any) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)


def _unknown_processor(name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"the image processor has {name} = {value!r}, which vitreg does not implement; "
        f"load the model with transformers, use from_transformers(model) and give it what the processor makes"
    )


def processor_from_preprocess(preprocess: Preprocess) -> dict[str, Any] | None:
    """The inverse, a `preprocessor_config.json`; None where transformers has no processor that does the same."""
    (height, width), fraction = preprocess.size, preprocess.crop_pct
    if preprocess.crop == "border" or (preprocess.crop != "squash" and height != width):
        return None
    full = [math.floor(side / fraction) for side in (height, width)]
    size = {"height": full[0], "width": full[1]} if preprocess.crop == "squash" else {"shortest_edge": full[0]}
    crop = fraction < 1 or preprocess.crop == "center"
    return {
        "image_processor_type": "CLIPImageProcessor",  # the one that can crop or not, squash or not
        "do_resize": True,
        "size": size,
        "resample": {name: number for number, name in FILTERS.items()}[preprocess.interpolation],
        "do_center_crop": crop and preprocess.crop != "none",
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
