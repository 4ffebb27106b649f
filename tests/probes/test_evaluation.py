"""All probes read one feature pass, and what was answered is not asked again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probes.dense import COLUMNS, ROWS, squares
from probes.labeled import images_of
from probes.small import small_vit
from vitreg.images import open_depth, open_image_set, open_segmentation
from vitreg.model import Preprocess, VisionTransformer
from vitreg.probes import FeatureStore
from vitreg.probes.catalogue import PROBES, EvalData
from vitreg.probes.evaluation import evaluate
from vitreg.probes.passes import PassConfig, preprocessing
from vitreg.probes.protocols import LinearConfig, PositionConfig
from vitreg.probes.results.result_cache import Answer
from vitreg.probes.results.score import ProbeResult
from vitreg.probes.tasks.reconstruction import ReconstructionConfig
from vitreg.probes.tasks.segmentation import SegmentationConfig
from vitreg.probes.tasks.single_token import SingleTokenConfig

LABELS = (3, 7, 20)
SIZE = (16 * ROWS, 16 * COLUMNS)
SHORT = {
    "knn": PROBES["knn"].config,
    "linear": LinearConfig(learning_rates=(0.1,), epochs=1, epoch_length=20, head_batch_size=8),
    "tokens": SingleTokenConfig(draws=1),
    "position": PositionConfig(),
    "reconstruction": ReconstructionConfig(),
}


@contextlib.contextmanager
def silent(title):
    yield lambda *_: None


def answers(
    vit: VisionTransformer, data: EvalData, probes: Mapping[str, Any], out: Path, **options: Any
) -> dict[str, Answer]:
    """What probes say of a model, by their names."""
    found = evaluate(vit, "small", [data], probes, out, stage=silent, **options)
    return {answer.asked.probe: answer for answer in found}


@pytest.fixture(scope="module")
def classification(test_data):
    return EvalData("classification", images_of(test_data, "train", LABELS, 10), images_of(test_data, "val", LABELS, 6))


@pytest.fixture
def counted():
    """The small model, and how many images of which size went through its first block."""
    vit, seen = small_vit(), Counter()
    vit.blocks[0].register_forward_hook(lambda _, inputs, __: seen.update({inputs[0].shape[1]: inputs[0].shape[0]}))
    return vit, seen


def test_every_image_goes_through_the_model_once(classification, counted, tmp_path):
    """Whatever the number of probes: exactly one forward pass per model and data set."""
    vit, seen = counted
    once = len(classification.train) + len(classification.val)
    found = answers(vit, classification, SHORT, tmp_path)
    assert set(found) == set(SHORT)
    assert seen.total() == once
    assert {path.name.split("-")[2] for path in (tmp_path / "features").iterdir()} == {"training", "validation"}


def test_what_has_more_than_is_asked_for_is_not_computed_again(classification, counted, tmp_path):
    vit, seen = counted
    first = answers(vit, classification, SHORT, tmp_path)["knn"]
    once = seen.total()
    (tmp_path / "answers" / "small-knn.safetensors").unlink()
    again = answers(vit, classification, {"knn": SHORT["knn"]}, tmp_path)["knn"]
    assert seen.total() == once
    np.testing.assert_array_equal(again.result.scores[0].sums, first.result.scores[0].sums)


def test_knn_keeps_no_patches_and_no_norms(classification, counted, tmp_path):
    """130 GB for ImageNet; the linear probe after it reads the same pass, and patch probes make their own."""
    vit, seen = counted
    answers(vit, classification, {"knn": SHORT["knn"]}, tmp_path)
    once = seen.total()
    (store,) = [FeatureStore.open(path) for path in (tmp_path / "features").glob("*training*")]
    (shard,) = store.shards
    assert shard.num_with_patches == 0
    assert shard.path.stat().st_size < 400 * 2 * 48 * 10
    answers(vit, classification, {"linear": SHORT["linear"]}, tmp_path)
    assert seen.total() == once
    answers(vit, classification, {"position": SHORT["position"]}, tmp_path)
    assert seen.total() == 2 * once


def test_answers_are_kept(classification, tmp_path, monkeypatch):
    vit = small_vit()
    probes = {"knn": SHORT["knn"]}
    first = answers(vit, classification, probes, tmp_path)["knn"].result
    asked = []
    probe = PROBES["knn"]
    monkeypatch.setitem(
        PROBES, "knn", dataclasses.replace(probe, ask=lambda *args: asked.append(args) or probe.ask(*args))
    )
    again = answers(vit, classification, probes, tmp_path)["knn"].result
    assert not asked
    assert again.details == first.details
    for one, other in zip(first.scores, again.scores, strict=True):
        np.testing.assert_array_equal(one.sums, other.sums)
    # Other settings are another question, and so are other weights.
    answers(vit, classification, {"knn": dataclasses.replace(SHORT["knn"], k=(3,))}, tmp_path)
    answers(small_vit(1), classification, probes, tmp_path)
    assert len(asked) == 2


def test_several_sizes_are_passes_of_their_own(counted, tmp_path):
    """+ms reads four blocks, and the validation images in two more sizes."""
    vit, seen = counted
    train, val = open_segmentation(str(squares(tmp_path / "data")))
    data = EvalData("segmentation", train, val, SIZE)
    config = SegmentationConfig(steps=60)
    found = answers(vit, data, {"segmentation": config, "segmentation-ms": config}, tmp_path / "out")
    extra = 1 + vit.num_registers
    assert seen == {
        ROWS * COLUMNS + extra: len(train) + len(val),
        **{round(ROWS * s) * round(COLUMNS * s) + extra: len(val) for s in (1.32, 1.73)},
    }
    results = {name: answer.result for name, answer in found.items()}
    assert results["segmentation"].details["sizes"] == [list(SIZE)]
    assert results["segmentation-ms"].details["sizes"] == [[64, 96], [80, 128], [112, 160]]
    assert results["segmentation-ms"].details["blocks"] == [0, 1, 2]
    assert sorted(found["segmentation"].shown) == [0, 1, 2, 4, 5, 6], "six of seven, evenly spread"
    assert all(result.scores[0].value > 60 for result in results.values()), "colors are told apart"


def asked(data: EvalData, out: Path, **settings: Any) -> ProbeResult:
    """What the probe of a dense task says of the small model."""
    config = dataclasses.replace(PROBES[data.task].config, steps=5, **settings)
    return answers(small_vit(), data, {data.task: config}, out)[data.task].result


def test_another_scale_is_not_answered_with_the_figures_of_the_first(tmp_path):
    root, out = str(squares(tmp_path / "data", train=4, val=2)), tmp_path / "out"
    first, other = (asked(EvalData("depth", *open_depth(root, scale=scale), SIZE), out) for scale in (0.001, 0.0005))
    assert first.details["training_mean"] == pytest.approx(2 * other.details["training_mean"])
    assert first.scores[0].value != other.scores[0].value
    again = asked(EvalData("depth", *open_depth(root), SIZE), out)
    assert again.scores[0].value == first.scores[0].value
    assert len(list((out / "features").iterdir())) == 2, "features do not depend on targets"


def test_another_ignored_class_is_not_answered_with_the_figures_of_the_first(tmp_path):
    root, out = str(squares(tmp_path / "data", train=4, val=2)), tmp_path / "out"
    first, other = (
        asked(EvalData("segmentation", *open_segmentation(root, ignore=ignore), SIZE), out) for ignore in (None, 2)
    )
    assert [len(result.details["IoU"]) for result in (first, other)] == [3, 2]


@pytest.mark.parametrize("part", ["train", "val"])
def test_replaced_masks_are_not_answered_with_the_figures_of_the_first(part, tmp_path):
    """By files of the same size, at the same time."""
    root, out = squares(tmp_path / "data", train=4, val=2), tmp_path / "out"
    for path in (root / part / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        path.unlink()
        Image.fromarray(mask).save(path.with_suffix(".bmp"))
    first = asked(EvalData("segmentation", *open_segmentation(str(root)), SIZE), out)
    for path in (root / part / "masks").iterdir():
        before, mask = path.stat(), np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 0, 1, mask)).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    other = asked(EvalData("segmentation", *open_segmentation(str(root)), SIZE), out)
    assert other.details["IoU"] != first.details["IoU"]


def test_replaced_images_are_computed_again(tmp_path):
    root, out = squares(tmp_path / "data", train=4, val=2), tmp_path / "out"
    first = asked(EvalData("depth", *open_depth(str(root)), SIZE), out)
    for path in (root / "val" / "images").iterdir():
        Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)
    assert asked(EvalData("depth", *open_depth(str(root)), SIZE), out).scores[0].value != first.scores[0].value


def test_sizes_are_those_of_the_protocol(classification, tmp_path):
    """A checkpoint of 518 px is asked at 224, as DINOv2 does; one of 64 px stays what it is, and so does zero-shot."""
    vit = small_vit()
    knn, zero_shot = PROBES["knn"], PROBES["zero-shot"]
    assert preprocessing(vit, knn, classification) == vit.preprocess
    large = Preprocess(size=(512, 512), crop_pct=1.0)
    vit.config = dataclasses.replace(vit.config, preprocess=large)
    found = preprocessing(vit, knn, classification)
    assert (found.size, found.crop, found.crop_pct) == ((224, 224), "center", 0.875)
    assert preprocessing(vit, zero_shot, classification) == large
    asked = dataclasses.replace(classification, size=(100, 100))
    assert [preprocessing(vit, probe, asked).size for probe in (knn, zero_shot)] == [(96, 96)] * 2
    dense = EvalData("depth", *open_depth(str(squares(tmp_path, train=2, val=2))))
    found = preprocessing(vit, PROBES["depth"], dense)
    assert (found.size, found.crop, found.crop_pct) == ((480, 720), "squash", 1.0)
    assert preprocessing(vit, PROBES["depth"], dataclasses.replace(dense, size=(3, 33))).size == (16, 32)


def test_quick_keeps_what_was_chosen(classification, tmp_path):
    """Three draws that were asked for were cut to two, and nothing said so."""
    chosen = dataclasses.replace(PROBES["position"].config, epochs=7)
    found = answers(small_vit(), classification, {"position": chosen}, tmp_path, quick=True)
    assert set(found) == {"position"}, "nothing was cut"


def test_quick_is_never_taken_for_the_protocol(classification, tmp_path):
    probes = {name: PROBES[name].config for name in ("knn", "linear", "position")}
    found = answers(small_vit(), classification, probes, tmp_path, quick=True)
    assert set(found) == {"knn", "linear-quick", "position-quick"}, "k-NN has nothing to cut"
    assert found["linear-quick"].result.details["num_iterations"] == 200
    full = {**probes, "linear": SHORT["linear"]}
    assert set(answers(small_vit(), classification, full, tmp_path)) == set(probes)


@pytest.mark.parametrize(("num_train", "steps"), [(40, 200), (400, 800), (1000, None)])
def test_quick_heads_see_their_epochs_but_fewer_steps(num_train, steps):
    config = SegmentationConfig()
    assert PROBES["segmentation"].quick(config, num_train) == dataclasses.replace(config, steps=steps)
    short = dataclasses.replace(config, steps=50)
    assert PROBES["segmentation"].quick(short, num_train) == short


def test_bytes_and_time_are_said_before(classification, tmp_path):
    said = []
    slow = LinearConfig(epochs=10, epoch_length=100000)
    stop = KeyboardInterrupt

    @contextlib.contextmanager
    def stage(title):
        def on_progress(done, total):
            if title == "small: linear":
                raise stop

        yield on_progress

    with pytest.raises(stop):
        list(evaluate(small_vit(), "small", [classification], {"linear": slow}, tmp_path, stage=stage, say=said.append))
    training, validation, time = said
    assert re.fullmatch(r"small: features of 30 training images at 64 px take [\d.]+ kB in .*features", training)
    assert "18 validation images" in validation
    assert re.fullmatch(r"small: what is left takes on this machine about: linear (\d+ min|\d+ h \d\d min)", time)


def test_a_class_folder_that_vanishes_ends_the_pass_which_goes_on_when_it_is_back(test_data, tmp_path):
    """Left out, its images would be missing from the figures without a word, and from the kept features for ever."""
    images = open_image_set(test_data / "tiny-imagenet-100" / "val.parquet")
    for i in range(12):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        images.image(i).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    opened = open_image_set(tmp_path / "data")
    data, probes = EvalData("classification", opened, opened), {"knn": SHORT["knn"]}
    away, vit = tmp_path / "away", small_vit()

    def move_away(*_: object) -> None:
        if not away.exists():
            (tmp_path / "data" / "b").rename(away)

    hook = vit.blocks[0].register_forward_hook(move_away)
    config = PassConfig(batch_size=1)
    with pytest.raises(ValueError, match=r"data/b/\d+\.png was there when the pass began and is gone; restore it"):
        answers(vit, data, probes, tmp_path / "out", config=config)
    hook.remove()
    away.rename(tmp_path / "data" / "b")
    found = answers(vit, data, probes, tmp_path / "out", config=config)["knn"].result
    assert found.details["num_val"] == 12
    assert found.details["skipped"] == {"training": 0, "validation": 0}
