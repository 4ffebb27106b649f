"""Sweeps: the settings, one forward pass for all of them, and continuing what was interrupted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitreg
from peers import timm_model
from vitreg import discover_objects
from vitreg.discovery.protocol import DEFAULT, Protocol
from vitreg.discovery.summary import describe, hits, summarize
from vitreg.discovery.sweep import VALUES, find_boxes, settings
from vitreg.images import BoxedImage, BoxSet

CHOICES = [Protocol("keys", -1, False, False), Protocol("values", -2, True, True, 0.05), Protocol("tokens", -1, True)]


@pytest.fixture
def small():
    return vitreg.from_timm(timm_model("vit_tiny_patch16_224", img_size=64))


@pytest.fixture
def images(tmp_path, photos):
    found = []
    for number, image in enumerate(photos[:6]):
        path = tmp_path / f"{number}.png"
        image.resize((100 - 20 * (number % 2), 64)).save(path)
        found.append(BoxedImage(path, np.array([[0.0, 0, 60, 60]])))
    return found


def test_the_sweep_of_the_issue_has_48_settings():
    swept = settings(["blocks", "facets", "normalize", "center"])
    assert len(set(swept)) == len(swept) == 48
    assert {p.block for p in swept} == {-4, -3, -2, -1}
    assert {p.facet for p in swept} == {"queries", "keys", "values"}
    assert {(p.normalize, p.center) for p in swept} == {(a, b) for a in (False, True) for b in (False, True)}
    assert {p.bias for p in swept} == {0.0}


def test_a_bias_goes_with_normalized_features_only():
    assert {p.bias for p in settings(list(VALUES)) if not p.normalize} == {0.0}
    assert len({p.bias for p in settings(["bias", "normalize"]) if p.normalize}) > 5


def test_no_axis_and_unknown_axis():
    assert settings([]) == []
    with pytest.raises(ValueError, match="'layers' is unknown; choose from blocks, facets"):
        settings(["layers"])


def test_boxes_are_those_of_discover_objects_from_one_pass_a_batch(small, images, tmp_path, monkeypatch):
    passes = []
    trace = small.trace
    monkeypatch.setattr(small, "trace", lambda x, **options: passes.append(len(x)) or trace(x, **options))
    boxes = find_boxes(small, "small", images, CHOICES, tmp_path / "record.jsonl", batch_size=3)
    assert passes == [3, 3]
    for s, p in enumerate(CHOICES):
        found = discover_objects(
            small,
            [image.path for image in images],
            facet=p.facet,
            block=p.block,
            normalize=p.normalize,
            center=p.center,
            bias=p.bias,
        )
        assert [tuple(row[s]) for row in boxes] == [detection.box for detection in found]


@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_sweep_continues_and_repeats_nothing(small, images, tmp_path, monkeypatch, cut):
    record = tmp_path / "record.jsonl"
    whole = find_boxes(small, "small", images, CHOICES, tmp_path / "other.jsonl", batch_size=1)
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        assert total == 6
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_boxes(small, "small", images, CHOICES, record, batch_size=1, on_progress=interrupt)
    assert seen == [0, 1, 2, 3, 4]
    if cut:  # killed in the middle of a line
        record.write_text(record.read_text()[:-cut])
    passes = []
    trace = small.trace
    monkeypatch.setattr(small, "trace", lambda x, **options: passes.append(len(x)) or trace(x, **options))
    assert find_boxes(small, "small", images, CHOICES, record, batch_size=1) == whole
    assert sum(passes) == (3 if cut else 2)
    assert find_boxes(small, "small", images, CHOICES, record) == whole
    assert sum(passes) == (3 if cut else 2)
    assert len(record.read_text().splitlines()) == 7


def test_a_record_of_something_else_is_refused(small, images, tmp_path):
    record = tmp_path / "record.jsonl"
    find_boxes(small, "small", images, CHOICES, record)
    with torch.no_grad():
        small.norm.weight[0] += 1
    with pytest.raises(ValueError, match=r"another sweep \(its weights differ\); delete it or choose another folder"):
        find_boxes(small, "small", images, CHOICES, record)
    with pytest.raises(ValueError, match=r"another sweep"):
        find_boxes(small, "small", images, CHOICES[:1], record)
    record.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="no record of a sweep"):
        find_boxes(small, "small", images, CHOICES, record)


def test_boxes_of_images_that_were_replaced_are_not_taken_for_theirs(small, images, tmp_path):
    record = tmp_path / "record.jsonl"
    find_boxes(small, "small", images, CHOICES, record)
    Image.new("RGB", (100, 64), "gray").save(images[0].path)
    with pytest.raises(ValueError, match=r"another sweep \(its files differ\)"):
        find_boxes(small, "small", images, CHOICES, record)


def test_too_small_an_image_is_named_before_anything_runs(small, images, tmp_path):
    Image.new("RGB", (100, 20)).save(tmp_path / "flat.png")
    images.append(BoxedImage(tmp_path / "flat.png", np.ones((1, 4))))
    with pytest.raises(ValueError, match=r"flat\.png has 100 x 20 pixels"):
        find_boxes(small, "small", images, CHOICES, tmp_path / "record.jsonl")
    assert not (tmp_path / "record.jsonl").exists()


@pytest.fixture
def summary(images):
    """100 images, two models, two settings: the second setting and the second model are better."""
    images = [images[i % 6] for i in range(100)]
    protocols = [DEFAULT, Protocol("queries", -3, True, False, -0.2)]
    rng = np.random.default_rng(0)
    first = rng.random((2, 100)) < np.array([[0.3], [0.5]])
    second = first | (rng.random((2, 100)) < 0.4)
    boxed = BoxSet((*images, BoxedImage(images[0].path, np.empty((0, 4)))), (images[0].path,))
    found = {"old": first, "new": second}
    return found, summarize(found, protocols, images, data="yolo:x", boxed=boxed, swept=protocols)


def test_summary_counts_and_judges_on_the_other_half(summary):
    found, summary = summary
    json.dumps(summary, allow_nan=False)
    assert (summary["num_images"], summary["num_images_without_boxes"], len(summary["missing_images"])) == (100, 1, 1)
    for model in summary["models"]:
        hit = found[model["model"]]
        assert model["protocol"]["corloc"] == pytest.approx(100 * hit[0].mean())
        assert model["best"]["setting"]["facet"] == "queries"
        assert model["best"]["corloc"] == pytest.approx(100 * hit[1].mean())
        assert model["mean"]["corloc"] == pytest.approx(100 * hit.mean())
        low, high = model["best"]["interval"]
        assert 3 < model["best"]["corloc"] - low < 12
        assert 3 < high - model["best"]["corloc"] < 12
        halves = model["halves"]
        assert halves["on_the_half_that_chose_it"]["num_images"] == halves["on_the_other_half"]["num_images"] == 50
        together = halves["on_the_half_that_chose_it"]["corloc"] + halves["on_the_other_half"]["corloc"]
        assert together / 2 == pytest.approx(100 * hit[1].mean())


def test_summary_compares_models_image_by_image(summary):
    found, summary = summary
    (difference,) = summary["differences"]
    assert (difference["model"], difference["minus"]) == ("new", "old")
    expected = 100 * (found["new"][0].mean() - found["old"][0].mean())
    assert difference["protocol"]["corloc"] == pytest.approx(expected)
    assert difference["protocol"]["interval"][0] > 0


def test_the_best_setting_is_chosen_without_the_other_half(images):
    from vitreg.discovery.corloc import half

    chosen = half(6)
    protocols = [DEFAULT, Protocol("keys", -4)]
    # The first is right where settings are judged, the second where they are chosen, and everywhere but there.
    found = np.stack([~chosen, chosen])
    made = summarize({"m": found}, protocols, images, data="x", boxed=BoxSet(tuple(images)), swept=protocols)
    halves = made["models"][0]["halves"]
    assert halves["name"] == describe(protocols[1])
    assert halves["on_the_half_that_chose_it"]["corloc"] == 100
    assert halves["on_the_other_half"]["corloc"] == 0


def test_whole_image_and_hits(images):
    made = summarize({"m": np.ones((1, 6), bool)}, [DEFAULT], images, data="x", boxed=BoxSet(tuple(images)), swept=[])
    # 60 x 60 of 100 x 64 is 0.56, of 80 x 64 0.70.
    assert made["whole_image"]["corloc"] == 100
    assert "best" not in made["models"][0]
    boxes = [[[0, 0, 60, 60], [0, 0, 30, 30]]] * 6
    np.testing.assert_array_equal(hits(boxes, images), [[True] * 6, [False] * 6])


def test_a_kill_while_a_record_is_trimmed_does_not_lose_the_sweep(small, images, tmp_path, monkeypatch):
    record = tmp_path / "record.jsonl"
    whole = find_boxes(small, "small", images, CHOICES, record)
    half = record.read_text()[:-7]
    record.write_text(half)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    # The last moment at which the file is not yet written anew.
    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        find_boxes(small, "small", images, CHOICES, record)
    assert record.read_text() == half
    monkeypatch.undo()
    assert find_boxes(small, "small", images, CHOICES, record) == whole


def test_a_full_disk_stops_a_sweep_with_a_sentence_and_keeps_what_is_done(small, images, tmp_path):
    import resource

    record = tmp_path / "record.jsonl"
    whole = find_boxes(small, "small", images, CHOICES, tmp_path / "other.jsonl", batch_size=1)
    size = (tmp_path / "other.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, limits[1]))
    try:
        with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: File too large; make room"):
            find_boxes(small, "small", images, CHOICES, record, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    seen: list[int] = []
    again = find_boxes(small, "small", images, CHOICES, record, batch_size=1, on_progress=lambda n, _: seen.append(n))
    assert again == whole
    assert seen[0] > 0
