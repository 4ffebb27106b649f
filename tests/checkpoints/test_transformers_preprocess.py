"""`preprocessor_config.json` against transformers' own image processors."""

import math

import numpy as np
import pytest
import torch

from checkpoints.transformers_models import close, hf
from vitreg.checkpoints.processors import preprocess_from_processor
from vitreg.checkpoints.state import CheckpointError
from vitreg.images import bundled_photographs, read_image

PROCESSORS = {
    # preprocessor_config.json of openai/clip-vit-base-patch32, google/vit-base-patch16-224 (before and after
    # 4.26), facebook/dinov2-base, a processor without crop, google/siglip2-base-patch16-naflex
    "clip": (
        {
            "crop_size": 224,
            "do_center_crop": True,
            "resample": 3,
            "size": 224,
            "image_mean": [0.4] * 3,
            "image_std": [0.2] * 3,
        },
        ((224, 224), "center", "bicubic", 1.0),
    ),
    "vit before 4.26": (
        {"do_normalize": True, "size": 224, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ((224, 224), "squash", "bilinear", 1.0),
    ),
    "vit": (
        {
            "size": {"height": 224, "width": 224},
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ((224, 224), "squash", "bilinear", 1.0),
    ),
    "dinov2": (
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        ((224, 224), "center", "bicubic", 0.875),
    ),
    "aspect kept": (
        {
            "size": {"shortest_edge": 224},
            "do_center_crop": False,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ((224, 224), "none", "bicubic", 1.0),
    ),
    "naflex": (
        {
            "patch_size": 16,
            "max_num_patches": 256,
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ((256, 256), "squash", "bilinear", 1.0),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocess_from_processor(name):
    config, expected = PROCESSORS[name]
    preprocess = preprocess_from_processor(config, 16)
    assert (preprocess.size, preprocess.crop, preprocess.interpolation, preprocess.crop_pct) == expected
    assert preprocess.mean == tuple(config["image_mean"])
    assert preprocess.multiple_of == 16


@pytest.mark.parametrize(("crop", "edge"), [(c, e) for e in range(224, 600, 13) for c in (196, 217, 224)])
def test_crop_fraction_gives_the_edge_back(crop, edge):
    config = {"size": {"shortest_edge": edge}, "crop_size": crop, "do_center_crop": True}
    preprocess = preprocess_from_processor(config | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 1)
    assert math.floor(crop / preprocess.crop_pct) == edge


@pytest.mark.parametrize(("height", "width"), [(320, 480), (300, 200), (224, 224)])
@pytest.mark.parametrize(
    "kind",
    ["CLIPImageProcessor", "BitImageProcessor", "ViTImageProcessor", "SiglipImageProcessor", "BlipImageProcessor"],
)
def test_preprocess_equals_the_image_processor(kind, height, width):
    """Up to the rounding of single pixels: a shifted crop or another filter is ten times as far away."""
    processor = (getattr(hf, f"{kind}Pil", None) or getattr(hf, kind))()
    image = read_image(next(path for path in bundled_photographs() if path.stem == "coffee")).crop(
        (0, 0, width, height)
    )
    theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))
    close(preprocess_from_processor(processor.to_dict(), 1)(image), theirs, 1e-2)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (390, 250), (224, 224)])
def test_preprocess_equals_the_processor_of_depth_anything(height, width):
    """preprocessor_config.json of depth-anything/Depth-Anything-V2-Small-hf, at another size."""
    options = dict(keep_aspect_ratio=True, ensure_multiple_of=14, size={"height": 224, "width": 224}, resample=3)
    processor = (getattr(hf, "DPTImageProcessorPil", None) or hf.DPTImageProcessor)(**options)
    image = read_image(next(path for path in bundled_photographs() if path.stem == "coffee")).crop(
        (0, 0, width, height)
    )
    theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))
    close(preprocess_from_processor(processor.to_dict(), 14)(image), theirs, 1e-2)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 150)])
def test_preprocess_equals_the_processor_of_siglip2_at_the_grid_that_it_chooses(height, width):
    """Theirs keeps the aspect ratio of each image, as nearly as whole patches go; a batch of ours has one size."""
    processor = (getattr(hf, "Siglip2ImageProcessorPil", None) or hf.Siglip2ImageProcessor)(max_num_patches=64)
    image = read_image(next(path for path in bundled_photographs() if path.stem == "coffee")).crop(
        (0, 0, width, height)
    )
    made = processor(image, return_tensors="np")
    rows, columns = (int(side) for side in made["spatial_shapes"][0])
    assert rows != columns
    assert rows * columns <= 64
    patches = torch.as_tensor(np.asarray(made["pixel_values"][0][: rows * columns]))
    theirs = patches.view(rows, columns, 16, 16, 3).permute(4, 0, 2, 1, 3).reshape(3, rows * 16, columns * 16)
    ours = preprocess_from_processor(processor.to_dict(), 16)
    assert ours.size == (128, 128)
    close(ours.with_size(rows * 16, columns * 16)(image), theirs, 1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"longest_edge": 1024}}, "size"),
        ({"resample": 4}, "resample"),
        ({"keep_aspect_ratio": True, "size": {"height": 224, "width": 256}}, "keep_aspect_ratio"),
        ({"ensure_multiple_of": 24}, "ensure_multiple_of"),
        ({"image_processor_type": "JanusImageProcessor"}, "do_pad"),
        ({"do_pad": True, "image_processor_type": "Owlv2ImageProcessor"}, "do_pad"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"image_mean": None}, "image_mean"),
        ({"size": {"shortest_edge": 100}, "do_center_crop": True, "crop_size": 224}, "crop_size"),
        ({"size": {"shortest_edge": 288}, "do_center_crop": True, "crop_size": {"shortest_edge": 288}}, "crop_size"),
    ],
)
def test_processors_beyond_preprocess_are_refused(change, message):
    config = {
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    with pytest.raises(CheckpointError, match=message):
        preprocess_from_processor(config | change, 16)


def test_values_pass_without_normalization():
    preprocess = preprocess_from_processor({"size": 32, "do_normalize": False}, 16)
    assert (preprocess.mean, preprocess.std) == ((0.0,) * 3, (1.0,) * 3)
