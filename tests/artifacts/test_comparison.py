"""`compare` against direct computation, on planted artifacts, and on models that differ."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal

import pytest
import torch
import torch.nn.functional as F

import vitreg
from peers import random_images
from registers.planting import GREEN, photos, plant, random_vit, with_patches

SMALL = dict(embed_dim=96, num_heads=3)


@pytest.fixture(scope="module")
def fixed(_tiny_vit):
    return vitreg.add_test_time_registers(_tiny_vit, neurons=[(7, 417), (6, 189)])


@pytest.fixture(scope="module")
def comparison(_tiny_vit, fixed, photograph_batch):
    return vitreg.compare(_tiny_vit, fixed, photograph_batch, batch_size=7)


def test_the_numbers_are_those_of_two_passes(tiny_vit, fixed, photograph_batch, comparison):
    with torch.inference_mode():
        before, after = (v.trace(photograph_batch, attention_from="cls") for v in (tiny_vit, fixed))
        logits = [v.classify(photograph_batch) for v in (tiny_vit, fixed)]
    for b in comparison.blocks:
        one, two = before.patch_norms[b.block], after.patch_norms[b.block]
        assert (b.max_before, b.max_after) == pytest.approx((float(one.max()), float(two.max())), rel=1e-5)
        if b.threshold is None:
            assert (b.outlier_fraction_before, b.outlier_fraction_after) == (0, 0)
        else:
            assert b.outlier_fraction_before == pytest.approx(float((one >= b.threshold).float().mean()))
            assert b.outlier_fraction_after == pytest.approx(float((two >= b.threshold).float().mean()))
        share = after.attention.to_registers[b.block, :, :, 0].sum(-1).mean()
        assert b.attention_on_registers_after == pytest.approx(float(share), rel=1e-4)
    clean = before.patch_norms[-1].flatten(1) < comparison.before.threshold
    cosine = F.cosine_similarity(before.tokens.patches, after.tokens.patches, dim=-1)[clean].mean()
    assert comparison.patch_similarity == pytest.approx(float(cosine), rel=1e-5)
    cosine = F.cosine_similarity(before.tokens.cls, after.tokens.cls, dim=-1).mean()
    assert comparison.cls_similarity == pytest.approx(float(cosine), rel=1e-5)
    agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    assert comparison.head_agreement == pytest.approx(float(agreement))
    assert comparison.head_similarity == pytest.approx(float(F.cosine_similarity(*logits, dim=-1).mean()), rel=1e-5)


def test_each_model_is_diagnosed_as_alone(tiny_vit, fixed, photograph_batch, comparison):
    for vit, found in ((tiny_vit, comparison.before), (fixed, comparison.after)):
        alone = vitreg.diagnose(vit, photograph_batch, batch_size=7)
        assert found.verdict == alone.verdict
        assert found.blocks == alone.blocks


def test_the_real_fix_is_removed_in_words(comparison):
    assert comparison.outcome == "removed"
    text = " ".join(comparison.verdict)
    assert "are removed: after block 11, 2.0 % of the patches had norms of" in text
    assert "now 0 %" in text
    assert "register of the second model has a norm of" in text
    assert "the head's largest output is the same for" in text


def test_a_block_that_was_asked_for_may_be_before_the_artifacts(tiny_vit, fixed, photograph_batch):
    """It said that 0 % had norms of 0 or more."""
    comparison = vitreg.compare(tiny_vit, fixed, photograph_batch[:8], block=3)
    assert comparison.outcome == "removed"
    block = max(comparison.blocks, key=lambda b: b.outlier_fraction_before)
    assert f"after block {block.block}, 2" in comparison.verdict[0]
    assert "norms of 0 or more" not in comparison.verdict[0]


def test_a_model_against_itself_changes_nothing(tiny_vit, photograph_batch):
    same = vitreg.compare(tiny_vit, tiny_vit, photograph_batch[:16])
    assert same.outcome == "not removed"
    assert same.patch_similarity == pytest.approx(1, abs=1e-6)
    assert same.cls_similarity == pytest.approx(1, abs=1e-6)
    assert same.head_agreement == 1


def test_a_model_that_is_no_fix_is_not_called_a_failed_one(tiny_vit, photograph_batch, tmp_path):
    """It said "are not removed" and "other units, or attention, write it too" of a model against itself."""
    same = vitreg.compare(tiny_vit, tiny_vit, photograph_batch[:16])
    assert "are in the second model too: after block 11, 2.0 % of the patches had norms" in same.verdict[0]
    assert same.verdict[1].startswith("What is left: 2.0 % of the patches after block 7, with norms up to ")
    assert not any("units" in sentence or "not removed" in sentence for sentence in same.verdict)
    assert same.same_model
    assert same.verdict[0].startswith("The two models are the same. The artifacts of ")
    assert "the same model – vitreg comparison" in same.save(tmp_path).read_text()
    changed = vitreg.add_test_time_registers(tiny_vit, neurons=[(0, 0)])
    failed = vitreg.compare(tiny_vit, changed, photograph_batch[:16])
    assert not failed.same_model
    assert "are not removed: after block 11" in failed.verdict[0]
    assert "It appears in block 7 as before: other units" in failed.verdict[1]


def test_one_of_two_kinds_removed_is_partly_removed(photographs):
    vit = random_vit("vit_small_patch16_224", **SMALL)
    images, green = with_patches(photos(photographs, vit), 16, GREEN, seed=1)
    images, magenta = with_patches(images, 16)
    plant(vit, 1, (7,), images, magenta)
    plant(vit, 2, (11,), images, green & ~magenta)
    first = vitreg.compare(vit, vitreg.add_test_time_registers(vit, neurons=[(1, 7)]), images)
    assert first.outcome == "partly removed"
    assert "It appears in block 2, later than before (1): units of that block write it" in " ".join(first.verdict)
    both = vitreg.compare(vit, vitreg.add_test_time_registers(vit, neurons=[(1, 7), (2, 11)]), images)
    assert both.outcome == "removed"


def test_clean_models_and_swapped_ones(photographs):
    vit = random_vit("vit_small_patch16_224", **SMALL)
    images, marks = with_patches(photos(photographs, vit), 16)
    clean = vitreg.compare(vit, vit, images)
    assert clean.outcome == "nothing to remove"
    assert clean.verdict[0] == "Neither of the two models has artifacts."
    assert clean.verdict[1] == "The two models are the same."
    dirty = random_vit("vit_small_patch16_224", **SMALL)
    plant(dirty, 1, (7,), images, marks)
    swapped = vitreg.compare(vit, dirty, images)
    assert swapped.outcome == "nothing to remove"
    assert "has no artifacts to remove, but the second model has" in swapped.verdict[0]


def test_models_of_other_width_or_normalization(tiny_vit, photograph_batch):
    wider = random_vit("vit_small_patch16_224", size=224, depth=12, embed_dim=96, num_heads=3)
    comparison = vitreg.compare(tiny_vit, wider, photograph_batch[:4])
    assert comparison.patch_similarity is comparison.cls_similarity is comparison.head_agreement is None
    other = vitreg.add_registers(tiny_vit, 1)
    other.registers.data.zero_()
    preprocess = dataclasses.replace(tiny_vit.preprocess, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    other.config = dataclasses.replace(other.config, preprocess=preprocess)
    comparison = vitreg.compare(tiny_vit, other, photograph_batch[:4])
    direct = vitreg.diagnose(other, preprocess.normalize(tiny_vit.preprocess.unnormalize(photograph_batch[:4])))
    assert comparison.after.blocks == direct.blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depth=3), "blocks: 12 and 3; diagnose each"),
        (dict(depth=12, patch_size=32), "pixels to a side of a patch: 16 and 32"),
        (dict(depth=12, size=112), r"pixels of an image: \(224, 224\) and \(112, 112\)"),
        (dict(depth=12, class_token=False, global_pool="avg"), "class token: True and False"),
    ],
)
def test_models_that_cannot_be_compared_are_named(tiny_vit, photograph_batch, change, message):
    vit = random_vit("vit_small_patch16_224", **{"size": 224, **SMALL, **change})
    height, width = vit.config.image_size
    vit.config = dataclasses.replace(vit.config, preprocess=vitreg.Preprocess(size=(height, width)))
    with pytest.raises(ValueError, match=message):
        vitreg.compare(tiny_vit, vit, photograph_batch)


def test_ctrl_c_keeps_what_was_seen(tiny_vit, fixed):
    def interrupted():
        yield random_images(224, batch=4)
        raise KeyboardInterrupt

    partial = vitreg.compare(tiny_vit, fixed, interrupted(), keep_partial=True)
    assert partial.before.interrupted
    assert partial.before.num_images == partial.after.num_images == 4
    assert "interrupted" in partial.verdict[-1]
    with pytest.raises(KeyboardInterrupt):
        vitreg.compare(tiny_vit, fixed, interrupted())


@pytest.mark.parametrize("where", ["first model", "second model", "last block of the second", "between the sums"])
def test_ctrl_c_between_the_models_counts_a_batch_for_both_or_for_neither(tiny_vit, where):
    before, after = tiny_vit, vitreg.add_registers(tiny_vit, 1)
    number = itertools.count()
    module = {
        "first model": before.blocks[5],
        "second model": after.blocks[0],
        "last block of the second": after.blocks[11],
        "between the sums": before.head,  # whose outputs are compared when both models have been counted
    }[where]

    def interrupt(*_):
        if next(number) == 1:
            signal.raise_signal(signal.SIGINT)

    hook = module.register_forward_pre_hook(interrupt)
    partial = vitreg.compare(before, after, random_images(224, batch=12), batch_size=4, keep_partial=True)
    hook.remove()
    assert partial.before.interrupted
    done = 8 if where == "between the sums" else 4
    for diagnosis in (partial.before, partial.after):
        assert diagnosis.num_images == len(diagnosis.examples) == done
        assert {sum(block.histogram[1]) for block in diagnosis.blocks} == {done * 196}
    alone = vitreg.compare(before, after, random_images(224, batch=12)[:done], batch_size=4)
    assert partial.blocks == alone.blocks
    assert (partial.cls_similarity, partial.head_agreement) == (alone.cls_similarity, alone.head_agreement)
    partial.to_dict()


def test_saves_a_page_and_json(comparison, tmp_path):
    page = comparison.save(tmp_path / "new")
    assert page.name == "report.html"
    assert "test-time register added" in page.read_text()
    saved = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert saved["format"] == "vitreg-comparison/1"
    assert saved["outcome"] == "removed"
    assert len(saved["blocks"]) == 12
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file.*, or choose another folder"):
        comparison.save(tmp_path / "file")
