"""What a run records of itself: the diagnosis of held-out images."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import vitreg
from peers import perturb
from training.small import small_config
from vitreg.images import Subset, open_image_set, spaced_indices
from vitreg.training.engine.held_out_diagnosis import HeldOutDiagnosis

CPU = torch.device("cpu")


def test_a_diagnosis_is_that_of_diagnose(class_folders):
    images = open_image_set(class_folders / "val")
    config = dataclasses.replace(small_config(), num_diagnosed=7)
    method = perturb(config.method.build(config.model))
    watch = HeldOutDiagnosis(config, images, CPU)
    watch.read()
    seen = watch.look(method, method.vit, {}, final=True)
    chosen = [images.image(i) for i in spaced_indices(12, 7).tolist()]
    batch = torch.stack([method.vit.preprocess(image) for image in chosen])
    expected = vitreg.diagnose(method.vit, batch).to_dict()
    assert seen["num_images"] == 7
    for key in ("outlier_fraction", "has_artifacts", "threshold", "register_norms", "onset_block"):
        assert seen[key] == expected[key], key
    assert [block["median"] for block in seen["blocks"]] == pytest.approx([b["median"] for b in expected["blocks"]])
    assert seen["metrics"] == method.evaluate(method.vit, {}, images, 4)
    json.dumps(seen, allow_nan=False)
    # The same images every time.
    assert watch.look(method, method.vit, {}, final=False)["blocks"] == seen["blocks"]


def test_a_part_has_the_names_and_labels_of_the_set(class_folders):
    images = open_image_set(class_folders / "val")
    part = Subset(images, np.array([1, 5, 11]))
    assert len(part) == 3
    assert images.labels is not None
    assert part.labels == [images.labels[i] for i in (1, 5, 11)]
    assert [part.name(i) for i in range(3)] == [images.name(i) for i in (1, 5, 11)]
    assert part.image(2).tobytes() == images.image(11).tobytes()
    assert (part.classes, part.captions(0)) == (images.classes, ())


def test_images_that_cannot_be_read_are_left_out(folders):
    (folders / "val" / "class0" / "0.jpg").unlink()
    (folders / "val" / "class0" / "0.jpg").write_text("no image")
    images = open_image_set(folders / "val")
    config = dataclasses.replace(small_config(), num_diagnosed=3)
    method = config.method.build(config.model)
    watch = HeldOutDiagnosis(config, images, CPU)
    watch.read()
    seen = watch.look(method, method.vit, {}, final=True)
    batch = torch.stack([method.vit.preprocess(images.image(i)) for i in (6, 11)])
    expected = vitreg.diagnose(method.vit, batch).to_dict()
    assert seen["num_images"] == 2
    assert seen["register_norms"] == expected["register_norms"]
