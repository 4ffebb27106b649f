"""`Preprocess` against timm's evaluation transform, and its size arithmetic for images of any shape."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitreg.model.preprocess import MAX_ASPECT, Preprocess

DATA = Path(os.environ.get("VITREG_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    files = sorted((DATA / "imagenet-samples").glob("*.jpg"))[::60]
    files += sorted((DATA / "flickr8k-1k" / "images").glob("*.jpg"))[::150]
    if not files:
        pytest.skip(f"no photos in {DATA}; set VITREG_TEST_DATA")
    return [Image.open(file).convert("RGB") for file in files]


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 224, 224), "crop_pct": 0.9, **IMAGENET},
        {"input_size": (3, 224, 224), "crop_pct": 0.875, "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"input_size": (3, 518, 518), "crop_pct": 1.0, **IMAGENET},
        {"input_size": (3, 224, 224), "crop_pct": 0.95, "interpolation": "bilinear", **IMAGENET},
        {"input_size": (3, 224, 224), "crop_pct": 0.9, "mean": CLIP_MEAN, "std": CLIP_STD},
        {"input_size": (3, 384, 384), "crop_pct": 1.0, "crop_mode": "squash", **IMAGENET},
        {"input_size": (3, 224, 224), "crop_pct": 1.0, "crop_mode": "border", **IMAGENET},
        {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "border", **IMAGENET},
        # Before 1.0.31 timm forgets the filter here and takes bilinear.
        {"input_size": (3, 256, 192), "crop_pct": 1.0, "interpolation": "bilinear", **IMAGENET},
        {"input_size": (3, 160, 320), "crop_pct": 0.9, "interpolation": "bilinear", **IMAGENET},
        {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "lanczos", **IMAGENET},
    ],
    ids=lambda config: "-".join(str(config.get(key)) for key in ("input_size", "crop_pct", "crop_mode")),
)
def test_equals_timms_evaluation_transform_on_photos(photos, config):
    data = pytest.importorskip("timm.data")
    config = data.resolve_data_config(config)
    theirs_of, ours_of = data.create_transform(**config, is_training=False), Preprocess.from_timm(config)
    # Pillow 13 resizes rows first where that leaves less to do, earlier ones and torch columns first.
    may_swap = config["crop_mode"] == "squash" or config["interpolation"] == "lanczos"
    share, most = (0.05, 16) if may_swap else (0.02, 8)
    differing, above_one = [], []
    for photo in photos:
        ours, theirs = ours_of(photo), theirs_of(photo)
        assert ours.shape == theirs.shape
        levels = ((ours - theirs) * torch.tensor(config["std"]).view(3, 1, 1) * 255).abs()
        assert levels.max() < most
        differing.append((levels > 0.5).float().mean())
        above_one.append((levels > 1.5).float().mean())
    assert torch.stack(differing).mean() < share
    assert torch.stack(above_one).mean() < 1e-3


def test_equals_timm_bit_for_bit_where_nothing_is_resampled():
    data = pytest.importorskip("timm.data")
    config = data.resolve_data_config({"input_size": (3, 224, 224), "crop_pct": 0.875, **IMAGENET})
    photo = noise(256, 341)
    theirs = data.create_transform(**config, is_training=False)(photo)
    torch.testing.assert_close(Preprocess.from_timm(config)(photo), theirs, atol=1e-6, rtol=1e-6)


def test_from_timm_reads_every_pretrained_cfg_of_its_vision_transformers():
    models = pytest.importorskip("timm.models")
    for name in models.list_models(["vit_*", "deit*", "eva*", "beit*"], pretrained=True):
        config = models.get_pretrained_cfg(name).to_dict()
        if config["input_size"][0] == 3:
            preprocess = Preprocess.from_timm(config, multiple_of=14)
            assert preprocess.size == tuple(config["input_size"][1:])


def test_from_timm_fills_gaps_with_timms_defaults():
    assert Preprocess.from_timm({"crop_pct": None, "mean": None}) == Preprocess()


def test_from_timm_refuses_models_of_other_channels():
    with pytest.raises(ValueError, match="1 channels"):
        Preprocess.from_timm({"input_size": (1, 224, 224)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": "random"}, "bicubic.*bilinear"),
        ({"crop": "centre"}, "center.*squash"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.1}, "crop_pct"),
        ({"mean": (0.5,)}, "three numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "above 0"),
        ({"size": (8, 224), "multiple_of": 14}, "at least one patch"),
        ({"multiple_of": 0}, "at least one patch"),
    ],
)
def test_refuses_what_makes_no_sense(changes, message):
    # With beartype on, values outside of a Literal are a TypeError already.
    with pytest.raises((ValueError, TypeError), match=message):
        Preprocess(**changes)


def test_with_size_and_replace_change_nothing_else():
    preprocess = Preprocess(crop="squash", multiple_of=16)
    assert preprocess.with_size(320, 160) == dataclasses.replace(preprocess, size=(320, 160))
    assert preprocess.with_size(320, 160)(noise(50, 60)).shape == (3, 320, 160)


def test_size_left_over_by_patches_is_dropped_at_bottom_and_right_like_a_patch_embedding_does():
    photo = noise(300, 420)
    native = Preprocess(size=(384, 384), crop="squash", crop_pct=1.0)
    trimmed = dataclasses.replace(native, multiple_of=14)
    assert trimmed.output_size(300, 420) == (378, 378)
    assert torch.equal(trimmed(photo), native(photo)[:, :378, :378])


def test_call_is_normalized_pixels_and_unnormalize_goes_back():
    preprocess = Preprocess(mean=CLIP_MEAN, std=CLIP_STD)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = preprocess.normalize(pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(images, (pixels / 255 - mean) / std)
    assert torch.equal(preprocess.unnormalize(images), pixels)
    assert torch.equal(preprocess.normalize(pixels[0]), images[0])
    photo = noise(300, 280)
    assert preprocess.pixels(photo).dtype == torch.uint8
    assert torch.equal(preprocess(photo), preprocess.normalize(preprocess.pixels(photo)))


def test_normalize_gives_the_same_on_the_other_device_path():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    scale, shift = Preprocess()._scale_and_shift(pixels.device)
    torch.testing.assert_close(Preprocess().normalize(pixels), pixels.float() * scale + shift)
    assert Preprocess().normalize(pixels.to("meta")).shape == (2, 3, 8, 8)


def test_border_pads_with_the_mean():
    pixels = Preprocess(size=(64, 64), crop="border", crop_pct=1.0).pixels(noise(32, 64))
    expected = torch.tensor([round(255 * value) for value in IMAGENET["mean"]])
    assert torch.equal(pixels[:, 0, 0].int(), expected.int())
    assert torch.equal(pixels[:, 16:48], torch.from_numpy(np.array(noise(32, 64))).permute(2, 0, 1))


def test_grey_images_get_three_channels():
    assert Preprocess()(Image.new("L", (300, 300), 128)).shape == (3, 224, 224)


@pytest.mark.parametrize("crop", ["center", "squash", "border", "none"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1000), (1000, 3), (2999, 1), (17, 255), (256, 256)])
def test_images_of_any_shape_come_out_as_promised(crop, interpolation, shape):
    preprocess = Preprocess((64, 48), crop=crop, interpolation=interpolation, multiple_of=16)
    photo = Image.new("RGB", shape[::-1], (10, 200, 30))
    pixels = preprocess.pixels(photo)
    assert pixels.shape == (3, *preprocess.output_size(*shape))
    if crop != "border":
        assert (torch.tensor([10, 200, 30]) == pixels.flatten(1).T).all()


sides = st.integers(1, 3000)


@given(
    sides,
    sides,
    st.sampled_from(["center", "squash", "border"]),
    st.floats(0.3, 1),
    st.sampled_from([1, 14, 16]),
)
def test_crops_always_have_the_promised_size(height, width, crop, fraction, multiple):
    preprocess = Preprocess((224, 160), crop=crop, crop_pct=fraction, multiple_of=multiple)
    assert preprocess.output_size(height, width) == (224 - 224 % multiple, 160 - 160 % multiple)
    x0, y0, x1, y1 = preprocess.region(height, width)
    assert x0 < x1
    assert y0 < y1
    if crop == "center" and multiple == 1:
        # The crop lies within the image, and its center is the image's to half a pixel of the output.
        assert x0 >= 0
        assert y0 >= 0
        assert x1 <= width + 1e-6
        assert y1 <= height + 1e-6
        assert abs((x0 + x1) - width) <= (x1 - x0) / 160 + 1e-6


@given(sides, sides, st.sampled_from([1, 8, 14, 16]))
def test_whole_images_keep_their_aspect_to_a_patch(height, width, multiple):
    preprocess = Preprocess((224, 224), crop="none", multiple_of=multiple)
    rows, columns = preprocess.output_size(height, width)
    assert rows % multiple == columns % multiple == 0
    assert min(rows, columns) == 224
    exact = min(224 * max(height, width) / min(height, width), 224 * MAX_ASPECT)
    assert abs(max(rows, columns) - exact) <= multiple / 2
    assert (rows >= columns) == (height >= width) or rows == columns
    assert preprocess.region(height, width) == pytest.approx((0, 0, width, height))


@pytest.mark.parametrize(("height", "width"), [(30, 40), (32, 48), (1, 1), (427, 640)])
def test_padding_keeps_every_pixel(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    preprocess = Preprocess(crop="pad", multiple_of=14, mean=(0.2, 0.4, 0.6))
    padded = preprocess.pixels(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
    assert padded.shape[:2] == preprocess.output_size(height, width)
    assert padded.shape[0] % 14 == padded.shape[1] % 14 == 0
    assert padded.shape[0] - height < 14 > padded.shape[1] - width
    np.testing.assert_array_equal(padded[:height, :width], pixels)
    assert (padded[height:] == [51, 102, 153]).all()
    assert (padded[:, width:] == [51, 102, 153]).all()
    assert preprocess.region(height, width) == (0, 0, padded.shape[1], padded.shape[0])


def test_region_finds_a_mark_again():
    photo = Image.new("RGB", (500, 300))
    photo.paste((255, 255, 255), (240, 100, 260, 110))
    preprocess = Preprocess(size=(112, 112), crop_pct=0.9)
    rows, columns = torch.nonzero(preprocess.pixels(photo)[0] > 127, as_tuple=True)
    x0, y0, x1, y1 = preprocess.region(300, 500)
    found = [
        x0 + columns.min().item() / 112 * (x1 - x0),
        y0 + rows.min().item() / 112 * (y1 - y0),
        x0 + (columns.max().item() + 1) / 112 * (x1 - x0),
        y0 + (rows.max().item() + 1) / 112 * (y1 - y0),
    ]
    assert found == pytest.approx([240, 100, 260, 110], abs=2.5)


def test_importing_does_not_load_torchvision_or_timm():
    source = Path(__file__).parents[2] / "src/vitreg/model/preprocess.py"
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('p', sys.argv[1]);"
        "m = u.module_from_spec(s); sys.modules['p'] = m; s.loader.exec_module(m);"
        "assert not {'torchvision', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(source)], check=True)
