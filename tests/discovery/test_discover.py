"""From images to boxes: sizes, padding, batches, every kind of model, bad input."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitreg
from peers import perturb, timm_model
from vitreg import discover_objects
from vitreg.discovery.features import FACETS, condition, patch_features
from vitreg.discovery.lost import lost
from vitreg.discovery.protocol import DEFAULT
from vitreg.images import ImageError


@pytest.fixture(scope="module")
def small():
    """A random model with two registers, patches of 16 pixels."""
    return vitreg.from_timm(timm_model("vit_tiny_patch16_224", img_size=64, reg_tokens=2, class_token=True))


@pytest.fixture
def files(tmp_path, photos):
    """Five images of three padded sizes, the sizes mixed."""
    sizes = [(150, 100), (100, 150), (145, 100), (64, 48), (150, 101)]
    paths = []
    for number, (image, size) in enumerate(zip(photos, sizes, strict=False)):
        paths.append(tmp_path / f"{number}.png")
        image.resize(size).save(paths[-1])
    return paths


def same(one, other):
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_array_equal(one.degree, other.degree)
    assert (one.box, one.seed) == (other.box, other.seed)


def test_a_image_is_padded_and_compared_as_documented(tiny_vit, files):
    """The definition, step by step: pixels as they are, zeros to the patch size, features, LOST, box in pixels."""
    pixels = np.array(Image.open(files[0]))
    images = torch.zeros(1, 3, 112, 160)
    images[0, :, :100, :150] = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    trace = tiny_vit.trace(images, facets=["queries"], blocks=[9])
    region = lost(condition(trace.queries.patches[0, 0].detach(), normalize=True, center=True), (7, 10), bias=0.05)
    found = discover_objects(tiny_vit, files[0], facet="queries", block=9, normalize=True, center=True, bias=0.05)[0]
    assert found.seed == region.seed
    np.testing.assert_array_equal(found.mask, region.mask)
    rows, columns = np.nonzero(region.mask)
    expected = (columns.min() * 16, rows.min() * 16, min(columns.max() * 16 + 16, 150), min(rows.max() * 16 + 16, 100))
    assert found.box == expected
    assert found.path == files[0]


@pytest.mark.parametrize("facet", FACETS)
def test_boxes_end_where_the_image_does(small, files, facet):
    for path, found in zip(files, discover_objects(small, files, facet=facet), strict=True):
        width, height = Image.open(path).size
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert found.mask.shape == (-(-height // 16), -(-width // 16)) == found.degree.shape
        assert found.mask[found.seed]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_order_and_result_do_not_depend_on_the_batch(small, files, batch_size):
    found = discover_objects(small, files, batch_size=batch_size)
    assert [detection.path for detection in found] == files
    for path, detection in zip(files, found, strict=True):
        same(detection, discover_objects(small, [path])[0])


def test_a_batch_of_any_size(small):
    images = torch.randn(3, 3, 70, 90)
    found = discover_objects(small, images, batch_size=2)
    padded = torch.zeros(3, 3, 80, 96)
    padded[..., :70, :90] = images
    for ours, theirs in zip(found, discover_objects(small, padded), strict=True):
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert ours.box[2] == min(theirs.box[2], 90)
        assert ours.box[3] == min(theirs.box[3], 70)
        assert ours.path is None


def test_tokens_are_what_the_model_returns(small):
    images = torch.randn(2, 3, 64, 64)
    features = patch_features(small, images, ["tokens", "keys"], [-1, 0])
    torch.testing.assert_close(features["tokens", -1], small(images).patches)
    assert not torch.equal(features["tokens", 0], features["tokens", -1])
    torch.testing.assert_close(features["keys", 0], small.trace(images, facets=["keys"], blocks=[0]).keys.patches[0])


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("deit3_small_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_any_family(architecture, options):
    model = perturb(timm.create_model(architecture, depth=2, embed_dim=64, num_heads=1, **options))
    vit = vitreg.from_timm(model)
    found = discover_objects(vit, torch.randn(2, 3, 60, 75), block=-2)
    assert len(found) == 2
    patch = vit.config.patch_size
    assert found[0].mask.shape == (-(-60 // patch), -(-75 // patch))


def test_further_objects_are_found_in_what_is_left(small, files):
    first = discover_objects(small, files)
    found = discover_objects(small, files, max_objects=4)
    for one, many in zip(first, found, strict=True):
        same(one, many)
        assert len(many.others) <= 3
        taken = many.mask.copy()
        for other in many.others:
            assert not (taken & other.mask).any()
            assert not other.degree[taken].any()
            taken |= other.mask
    assert any(many.others for many in found)


def test_nothing_is_left_of_a_image_that_is_one_object(tiny_vit):
    """A constant image of raw tokens that are all alike: one object, whatever is asked for."""
    found = discover_objects(
        tiny_vit, torch.zeros(1, 3, 64, 64), max_objects=9, normalize=False, bias=1e9, center=False
    )
    assert found[0].mask.all()
    assert found[0].others == ()


def test_tokencut_finds_one_object(small, files):
    found = discover_objects(small, files[:2], method="tokencut")
    assert all(detection.mask[detection.seed] for detection in found)
    with pytest.raises(ValueError, match="max_objects is 2"):
        discover_objects(small, files, method="tokencut", max_objects=2)


def test_lost_issue_d4_nothing_is_left_on_the_model(small, files):
    """The reference registers a hook for every image and removes none."""
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    discover_objects(small, files)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 5}, "block 5 does not exist"),
        ({"k_patches": 0}, "k_patches is 0"),
        ({"max_objects": 0}, "max_objects is 0"),
        ({"method": "cut"}, "method 'cut' is unknown; choose from lost, tokencut"),
    ],
)
def test_arguments_that_do_not_fit(small, options, message):
    with pytest.raises(ValueError, match=message):
        discover_objects(small, torch.randn(1, 3, 64, 64), **options)


def test_unknown_facet_and_missing_facet(small, monkeypatch):
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="'outputs' is unknown; choose from keys, queries, values, tokens"):
        discover_objects(small, images, facet="outputs")
    trace = small.trace
    monkeypatch.setattr(small, "trace", lambda *a, **k: dataclasses.replace(trace(*a, **k), keys=None))
    with pytest.raises(ValueError, match="the model has no keys"):
        discover_objects(small, images, facet="keys")


@pytest.mark.parametrize("size", [(47, 200), (200, 32), (1, 1)])
def test_a_image_of_fewer_than_3_x_3_patches(small, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "small.png")
    with pytest.raises(
        ValueError, match=rf"small\.png has {size[0]} x {size[1]} pixels; .* needs 3 x 3 patches of 16 pixels"
    ):
        discover_objects(small, tmp_path / "small.png")
    with pytest.raises(ValueError, match="an image of the batch has"):
        discover_objects(small, torch.zeros(1, 3, *size))


def test_a_file_that_is_no_image(small, files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError, match=r"text\.png"):
        discover_objects(small, tmp_path)


def test_models_that_overflow_are_reported(small):
    vit = copy.deepcopy(small)
    vit.patch_embed.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinity"):
        discover_objects(vit, torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"image 0 .* not finite"):
        discover_objects(small, torch.full((1, 3, 64, 64), torch.nan))


def test_open_images_and_arrays_are_found_in_as_their_files(small, files):
    """At their own size, in the order given."""
    expected = discover_objects(small, files[:3])
    opened = [Image.open(file) for file in files[:3]]
    for images in (opened, [np.asarray(image.convert("RGB")) for image in opened]):
        found = discover_objects(small, images)
        assert [d.box for d in found] == [d.box for d in expected]
        assert all(d.path is None for d in found)
    assert len(repr(found[0])) < 200


def test_defaults_are_the_protocol():
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(discover_objects).parameters.items()}
    assert dataclasses.asdict(DEFAULT).items() <= defaults.items()
