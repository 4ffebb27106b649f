"""When a diagnosis speaks of artifacts, when of a clean model, and when it says that it cannot tell."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import vitreg
from vitreg.artifacts.decision import ENOUGH_IMAGES, EVIDENT, decide
from vitreg.artifacts.histogram import NUM_BINS, LogAxis

AXIS = LogAxis()


def count(*norms: np.ndarray) -> np.ndarray:
    """Of one block."""
    return np.bincount(AXIS.bins(torch.from_numpy(np.concatenate(norms))).numpy(), minlength=NUM_BINS)[None]


def patches(num_images: int, seed: int = 0) -> np.ndarray:
    """Norms without artifacts, 196 an image."""
    return 10 * 2 ** np.random.default_rng(seed).normal(0, 0.2, 196 * num_images)


def test_a_green_clean_over_visible_artifacts(tiny_vit, test_data):
    """Of 100 photographs looked at one by one, 33 were called clean; all have corners of over 5 medians."""
    paths = sorted((test_data / "imagenet-samples").glob("*.jpg"))[::50][:20]
    found = [vitreg.diagnose(tiny_vit, path) for path in paths]
    assert sum(bool(d.has_artifacts) for d in found) >= 18
    assert not any(d.has_artifacts is False for d in found)


def test_corners_of_one_photograph_are_evident():
    """Norms of the ViT-Ti's photograph 20: the old rule asked for a chance of 5 % inside a quarter of an octave."""
    assert decide(AXIS, count(patches(1), np.array([463.5, 461.4, 355.8, 333.9])), 1).steps != [None]


def test_what_cannot_be_told_says_how_many_images_would_do():
    norms = [patches(1), np.array([440.0, 359.0])]
    decision = decide(AXIS, count(*norms), 1)
    assert decision.steps == [None]
    assert decision.undecided is not None
    assert (decision.undecided.num_patches, decision.undecided.block) == (2, 0)
    assert decision.undecided.ratio == pytest.approx(40, rel=0.15)
    needed = decision.undecided.num_images_needed
    assert decide(AXIS, count(*norms) * needed, needed).undecided is None
    assert decide(AXIS, count(*norms) * (needed // 2), needed // 2).undecided is not None or needed == 2


def test_a_nearby_mode_counts_only_in_many_images():
    """A few bright patches of one image are as far from the others as weak artifacts."""
    norms = [patches(4), np.full(12, 40.0)]
    assert EVIDENT * 10 > 40
    assert decide(AXIS, count(*norms), 4).undecided.num_images_needed == 128
    assert decide(AXIS, count(*norms) * 25, ENOUGH_IMAGES).steps != [None]


def test_a_smooth_tail_is_decided_however_long():
    tail = 10 * 2 ** np.random.default_rng(0).exponential(0.5, 20000)
    assert tail.max() > EVIDENT * np.median(tail)
    assert decide(AXIS, count(tail), 100) == decide(AXIS, count(patches(100)), 100)


def with_norms(num_large: int, ratio: float, num_images: int = 2) -> tuple[vitreg.VisionTransformer, torch.Tensor]:
    """A model whose block 0 gives so many patches of the first image a norm of so many medians."""
    torch.manual_seed(0)
    config = vitreg.ViTConfig(image_size=(64, 64), patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_dim=64)
    vit = vitreg.VisionTransformer(config).eval()

    def enlarge(module, args, output):
        large = torch.zeros(output.shape[:2], dtype=torch.bool)
        large[0, -num_large:] = num_large > 0
        norms = output.norm(dim=-1, keepdim=True)
        return torch.where(large[..., None], output * ratio * norms.median() / norms, output)

    vit.blocks[0].register_forward_hook(enlarge)
    return vit, torch.randn(num_images, 3, 64, 64)


def test_every_output_says_that_it_cannot_tell(tmp_path):
    vit, images = with_norms(1, 30)
    diagnosis = vitreg.diagnose(vit, images)
    assert (diagnosis.has_artifacts, diagnosis.status) == (None, "cannot tell")
    assert (diagnosis.threshold, diagnosis.outlier_fraction, diagnosis.onset_block) == (None, 0, None)
    needed = diagnosis.undecided.num_images_needed
    assert "cannot be told from 2 images: after block 1, 1 patch has a norm of 29.7 times" in diagnosis.verdict[0]
    assert diagnosis.verdict[0].endswith(f"give at least {needed} images.")
    diagnosis.save(tmp_path)
    saved = json.loads((tmp_path / "diagnosis.json").read_text())
    assert saved["has_artifacts"] is None
    assert saved["status"] == "cannot tell"
    assert saved["undecided"]["num_images_needed"] == needed
    page = (tmp_path / "report.html").read_text()
    assert 'class="flag good"' not in page
    assert 'class="flag middling">Cannot tell' in page
    assert len(repr(diagnosis).splitlines()) <= 3


def test_comparisons_of_what_cannot_be_told(tmp_path):
    undecided, images = with_norms(1, 30)
    clean, _ = with_norms(0, 1)
    ill, _ = with_norms(6, 30)
    for before, after, outcome, first in (
        (undecided, clean, "cannot tell", "Whether"),
        (ill, undecided, "partly removed", "The artifacts"),
        (clean, undecided, "nothing to remove", "Vision Transformer has no artifacts to remove."),
        (undecided, ill, "cannot tell", "Vision Transformer has none that these images prove, but the second"),
    ):
        comparison = vitreg.compare(before, after, images)
        assert comparison.outcome == outcome
        assert comparison.verdict[0].startswith(first)
        assert any("cannot be told from 2 images" in sentence for sentence in comparison.verdict)
        assert "Neither" not in " ".join(comparison.verdict)
        assert 'class="flag good"' not in comparison.save(tmp_path).read_text()


def test_a_rule_that_was_asked_for_finds_outliers_not_artifacts():
    """`mean+3sd` marks some patches of every model."""
    vit, images = with_norms(0, 1)
    marked = vitreg.diagnose(vit, images, threshold="mean+1sd")
    assert marked.status == "outliers"
    assert "has outliers by the rule that was asked for (mean + 1 standard deviations" in marked.verdict[0]
    unreached = vitreg.diagnose(vit, images, threshold=1000)
    assert (unreached.status, unreached.has_artifacts) == ("clean", False)
    assert "reaches the threshold that was asked for (fixed: norms of 1000 and more)" in unreached.verdict[0]
