"""`Batches`: every form in which images are given, and what is refused of them."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from vitreg.images import Batches, read_image
from vitreg.model.preprocess import Preprocess

SMALL = Preprocess(size=(16, 16), crop_pct=1.0)


def tensor(images, **options) -> torch.Tensor:
    return torch.cat([batch for batch, _ in Batches(images, SMALL, **options)])


@pytest.fixture
def expected(photos):
    return torch.stack([SMALL(read_image(photo)) for photo in photos])


def test_every_form_gives_the_same(photos, expected):
    pillow = [Image.open(photo) for photo in photos]
    arrays = [np.asarray(image) for image in pillow]
    forms = [photos, [str(p) for p in photos], photos[0].parent, pillow, tuple(pillow), arrays, np.stack(arrays)]
    forms += [expected, expected.numpy(), list(expected), iter(expected), iter(pillow)]
    forms += [DataLoader(TensorDataset(expected, torch.zeros(20)), batch_size=3), expected.split(3)]
    for images in forms:
        assert torch.equal(tensor(images, batch_size=6), expected)


def test_one_image_is_a_batch_of_one(photos, expected):
    first = Image.open(photos[0])
    for image in (photos[0], str(photos[0]), first, np.asarray(first), expected[0], expected[0].numpy()):
        assert torch.equal(tensor(image), expected[:1])
        assert Batches(image, SMALL).total == 1


def test_open_images_are_turned_and_flattened_as_files_are(tmp_path):
    turned = Image.new("RGB", (16, 8), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    paths = [tmp_path / "turned.jpg", tmp_path / "clear.png"]
    assert torch.equal(tensor([Image.open(path) for path in paths]), tensor(paths))
    assert (SMALL.unnormalize(tensor(clear)) == 255).all()


@pytest.mark.parametrize("limit", [1, 3, 20, 50])
def test_limit_spreads_over_the_images(photos, expected, limit):
    """The first of a folder that is sorted by class are all of one class; a batch was not limited at all."""
    numbers = np.linspace(0, 19, min(limit, 20)).round().astype(int)
    for images in (photos, expected, [Image.open(photo) for photo in photos]):
        assert torch.equal(tensor(images, limit=limit, batch_size=4), expected[numbers])
        assert Batches(images, SMALL, limit=limit).total == len(numbers)
    assert torch.equal(tensor(expected.split(7), limit=limit), expected[:limit])


def test_selected_images_keep_their_numbers(photos, expected):
    for images in (photos, expected, [Image.open(photo) for photo in photos], expected.split(7)):
        assert torch.equal(tensor(images, select=lambda i: i % 5 == 4, batch_size=2), expected[4::5])
    names = [name for _, names in Batches(expected.split(7), SMALL, select=lambda i: i % 5 == 4) for name in names]
    assert names == ["image 5", "image 10", "image 15", "image 20"]


def nan(images: torch.Tensor, index: int, value: float) -> torch.Tensor:
    images = images.clone()
    images[index, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: SMALL.unnormalize(x), "uint8 values, models take floats; normalize them: vit.preprocess.normalize"),
        (lambda x: SMALL.unnormalize(x).float(), "values up to 2.*, which are pixels; normalize them"),
        (lambda x: SMALL.unnormalize(x).movedim(1, -1), "the shape [20, 16, 16, 3]; expected .*images.movedim(-1, -3)"),
        (lambda x: x[0, 0], "the shape [16, 16]; expected [B, 3, H, W], or [3, H, W] for one"),
        (lambda x: x[:, :2], "the shape [20, 2, 16, 16]"),
        (lambda x: nan(x, 13, float("nan")), "image 13 (counted from 0) holds values that are not finite"),
        (lambda x: nan(x, 13, float("-inf")).split(8), "image 13 (counted from 0) holds values that are not finite"),
        (lambda x: iter(["photo.jpg"]), "images yields 'photo.jpg'; give files as a list"),
        (lambda x: [{"pixels": x}], "images yields dict; expected batches"),
        (
            lambda x: [np.zeros((16, 16, 3), np.uint8), "photo.jpg"],
            "an image that was given cannot be read (a str among open images)",
        ),
    ],
)
def test_what_no_model_takes_is_refused_with_what_to_do(expected, make, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        tensor(make(expected))


def test_none_is_no_images():
    """It was Python's TypeError."""
    init = inspect.unwrap(Batches.__init__)  # without the check of types that only tests have
    with pytest.raises(ValueError, match="images is None; give a batch, files"):
        init(Batches.__new__(Batches), None, SMALL)


@pytest.mark.parametrize("name", ["batch_size", "limit"])
def test_counts_below_one_are_refused(expected, photos, name):
    for images in (expected, photos, expected.split(3)):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            Batches(images, SMALL, **{name: 0})


def test_a_damaged_open_image_is_named_so(tmp_path, noise):
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match="an image that was given cannot be read"):
        tensor([Image.open(tmp_path / "cut.png")])
