import io
import random

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from vitreg.training.engine.method import Sample
from vitreg.training.engine.randomness import fixed_randomness
from vitreg.training.recipes.multi_crop import MultiCrop, MultiCropConfig
from vitreg.training.recipes.sizes import sized

MODEL = sized("micro", patch_size=8, image_size=64, num_registers=4)
CONFIG = MultiCropConfig(num_local=3, local_size=32)


@pytest.fixture(scope="module")
def samples(test_data):
    rows = parquet.read_table(test_data / "tiny-imagenet-100" / "val.parquet").slice(0, 40).column("image")
    return [Sample(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows.to_pylist()]


def test_rows(samples):
    views = MultiCrop(MODEL, CONFIG)
    row = views(samples[0])
    assert {name: (tuple(value.shape), value.dtype) for name, value in row.items()} == {
        "global": ((2, 3, 64, 64), torch.float32),
        "local": ((3, 3, 32, 32), torch.float32),
        "mask": ((2, 64), torch.bool),
    }


def test_the_same_randomness_gives_the_same_views(samples):
    views = MultiCrop(MODEL, CONFIG)
    rows = []
    for key in (5, 5, 6):
        with fixed_randomness(key):
            rows.append(views(samples[0]))
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])
    assert not torch.equal(rows[0]["global"], rows[2]["global"])


def test_masks_hide_what_is_configured(samples):
    views = MultiCrop(MODEL, CONFIG)
    random.seed(0)
    shares = torch.cat([views._mask()[None] for _ in range(600)]).float().mean(1)
    hidden = shares[shares > 0]
    assert 0.44 < len(hidden) / len(shares) < 0.56
    assert hidden.max() <= 0.5
    assert hidden.min() >= 4 / 64  # a block; the last one may not find a place, so that fewer than 10 % are hidden
    assert 0.25 < hidden.mean() < 0.35


def test_what_is_hidden_is_counted_before_it_is_on_the_device(samples):
    views = MultiCrop(MODEL, CONFIG)
    random.seed(0)
    batch = views.collate(torch.utils.data.default_collate([views(sample) for sample in samples[:6]]))
    masks, hidden = batch["mask"].flatten(0, 1), batch["hidden"]
    crops, places = hidden // 64, hidden % 64
    assert masks[crops, places].all()
    assert len(hidden) == masks.sum() > 0
    expected = [1 / (12 * int(masks[crop].sum())) for crop in crops.tolist()]
    assert batch["hidden_weight"].tolist() == pytest.approx(expected)


def test_masks_of_few_patches():
    small = sized("micro", patch_size=8, image_size=16, num_registers=0)
    views = MultiCrop(small, MultiCropConfig(local_size=8, mask_probability=1.0))
    assert all(views._mask().sum() <= 2 for _ in range(50))


def test_views_look_like_the_image(samples, monkeypatch):
    """Without changes of color and shape a view is the image, normalized with the model's mean and deviation."""
    views = MultiCrop(MODEL, MultiCropConfig(local_size=32, global_scale=(1.0, 1.0)))
    views._global = [lambda crop: crop] * 2
    image = samples[0].image
    expected = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    ) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    monkeypatch.setattr(
        "torchvision.transforms.RandomResizedCrop.get_params", lambda *_: (0, 0, image.height, image.width)
    )
    seen = [view for _ in range(8) for view in views(samples[0])["global"]]
    distances = [
        min(float((view - expected).abs().max()), float((view.flip(2) - expected).abs().max())) for view in seen
    ]
    assert max(distances) < 1e-5
    assert {float((view - expected).abs().max()) < 1e-5 for view in seen} == {True, False}  # half are mirrored


def test_a_large_image_of_any_shape():
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 900, 3), dtype=np.uint8))
    row = MultiCrop(MODEL, CONFIG)(Sample(wide))
    assert row["global"].isfinite().all()


def test_a_local_size_between_patches_is_refused():
    with pytest.raises(ValueError, match="local_size 30 is not a multiple of the patch size 8; take 24"):
        MultiCrop(MODEL, MultiCropConfig(local_size=30))


@pytest.mark.parametrize(
    "wrong", [dict(num_local=0), dict(mask_ratio=(0.5, 0.1)), dict(local_scale=(0.0, 0.3)), dict(mask_probability=1.5)]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MultiCropConfig(**wrong)
