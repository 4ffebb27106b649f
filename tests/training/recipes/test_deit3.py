"""The supervised recipe against timm: gradients, loss, mixing; and what it makes of registers."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data.mixup import Mixup
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import vitreg
from peers import error, perturb, random_images
from training.small import small_config
from vitreg.checkpoints.to_timm import to_timm_state
from vitreg.images import open_image_set, open_split
from vitreg.training.data.samples import SampleStream
from vitreg.training.engine.method import Sample
from vitreg.training.engine.optimizer import build_optimizer
from vitreg.training.engine.randomness import fixed_randomness
from vitreg.training.recipes.deit3 import DeiT3, DeiT3Config

CONFIG = small_config()


def small_method(**settings) -> DeiT3:
    return DeiT3Config(**settings).build(CONFIG.model)


def soft_targets() -> torch.Tensor:
    """Two classes of an image, as after mixup."""
    target = torch.zeros(8, 4)
    target[torch.arange(8), torch.arange(8) % 4] = 0.7
    target[torch.arange(8), torch.arange(8) // 3] += 0.3
    return target


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_gradients_are_timms(loss, tmp_path):
    method = small_method(loss=loss)
    perturb(method)
    vitreg.save(method.vit, tmp_path / "timm.safetensors", format="timm")
    with safe_open(tmp_path / "timm.safetensors", framework="pt") as file:
        metadata = file.metadata()
    peer = timm.create_model(metadata["architecture"], **json.loads(metadata["kwargs"]))
    peer.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    assert peer.num_reg_tokens == 4
    images, target = random_images(32, batch=8), soft_targets()

    ours = method({"image": images, "target": target}, 0.0)["loss"]
    ours.backward()
    criterion = BinaryCrossEntropy(target_threshold=0.0) if loss == "bce" else SoftTargetCrossEntropy()
    theirs = criterion(peer(images), target)
    theirs.backward()

    assert error(ours, theirs) < 1e-6
    # Our gradients under timm's names: those of a model that has them for weights.
    gradients = copy.deepcopy(method.vit)
    with torch.no_grad():
        for name, parameter in gradients.named_parameters():
            parameter.copy_(method.vit.get_parameter(name).grad)
    ours, compared = to_timm_state(gradients)[0], 0
    for name, parameter in peer.named_parameters():
        # timm has positions of class token and registers, too, which are zero in what we write.
        first = peer.num_prefix_tokens if name == "pos_embed" else 0
        pair = ours[name], parameter.grad
        assert error(*(gradient[:, first:] if first else gradient for gradient in pair)) < 1e-5, name
        compared += 1
    assert compared == len(list(method.vit.parameters()))


def test_transformers_zero_initialized_registers_stay_identical(class_folders):
    """transformers starts registers at zero; equal ones have equal gradients for ever (timm PR #2229 too)."""
    method = small_method()
    stream = SampleStream(
        open_image_set(class_folders / "train"),
        CONFIG.method.augmentation(CONFIG.model, open_image_set(class_folders / "train")),
        0,
    )
    optimizer = build_optimizer(method, CONFIG.optimizer)
    batch = stream[range(8)][0]
    for step in range(5):
        optimizer.zero_grad()
        method(batch, 0.0)["loss"].backward()
        if step == 0:
            assert smallest_distance(method.vit.registers.grad[0]) > 0.01
        optimizer.step()
    assert smallest_distance(method.vit.registers[0]) > 0.01
    # The same with the defect: registers are one and the same until the end.
    defect = small_method()
    torch.nn.init.zeros_(defect.vit.registers)
    optimizer = build_optimizer(defect, CONFIG.optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        defect(batch, 0.0)["loss"].backward()
        optimizer.step()
    assert defect.vit.registers.abs().max() > 1e-4
    assert smallest_distance(defect.vit.registers[0]) < 1e-6


def smallest_distance(rows: torch.Tensor) -> float:
    """Between two of the rows, relative to their size."""
    distances = torch.cdist(rows.detach(), rows.detach()) + torch.eye(len(rows)) * 1e9
    return float(distances.min() / rows.detach().norm(dim=1).mean())


def test_registers_are_not_in_the_pooled_feature():
    method = small_method()
    perturb(method)
    features = method.vit(random_images(32)).cls
    assert torch.equal(method.vit.classify(random_images(32)), method.vit.head(features))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_pairs_are_mixed_as_timm_does(mixup, cutmix, class_folders):
    images = open_image_set(class_folders / "train")
    config = DeiT3Config(mixup=mixup, cutmix=cutmix)
    views = config.augmentation(CONFIG.model, images)
    plain = DeiT3Config(mixup=0.0, cutmix=0.0).augmentation(CONFIG.model, images)
    mixed, unmixed = SampleStream(images, views, 3)[range(8)][0], SampleStream(images, plain, 3)[range(8)][0]
    peer = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=4)
    for first in range(0, 8, 2):
        pair = slice(first, first + 2)
        with fixed_randomness(3, first, 1):
            image, target = peer(unmixed["image"][pair].clone(), unmixed["target"][pair].argmax(1))
        assert torch.equal(mixed["image"][pair], image)
        assert torch.equal(mixed["target"][pair], target)
    assert not torch.equal(mixed["image"], unmixed["image"])
    # Each pair in its own way.
    assert len({float(row.max()) for row in mixed["target"]}) > 2


def test_unmixed_targets_and_smoothing_are_timms(class_folders):
    images = open_image_set(class_folders / "train")
    config = DeiT3Config(mixup=0.0, cutmix=0.0, loss="ce", smoothing=0.1)
    batch = SampleStream(images, config.augmentation(CONFIG.model, images), 0)[range(8)][0]
    method = perturb(config.build(CONFIG.model))
    labels = batch["target"].argmax(1)
    peer = LabelSmoothingCrossEntropy(0.1)(method.vit.classify(batch["image"]), labels)
    assert error(method(batch, 0.0)["loss"], peer) < 1e-5


def test_images_are_normalized_and_what_is_not_augmented_is_left_alone(class_folders):
    gentle = DeiT3Config(mixup=0.0, cutmix=0.0, three_augment=False, color_jitter=0.0, min_crop=1.0)
    views = gentle.augmentation(CONFIG.model, open_image_set(class_folders / "train"))
    photo = Image.fromarray(np.full((32, 32, 3), (255, 0, 0), np.uint8))
    image = views(Sample(photo, 2))["image"]
    preprocess = CONFIG.model.preprocess
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 32, 32))


def test_top1_is_counted_over_the_images_that_can_be_read(folders):
    _, held_out = open_split(folders)
    broken = folders / "val" / "class1" / "0.jpg"
    broken.unlink()
    broken.write_text("no image")
    method = perturb(small_method())
    with torch.no_grad():
        logits = {
            i: method.vit.classify(method.vit.preprocess(held_out.image(i))[None])[0]
            for i in range(12)
            if held_out.name(i) != str(broken)
        }
    assert len(logits) == 11
    right = sum(int(row.argmax()) == held_out.labels[i] for i, row in logits.items())
    assert 0 < right < 11
    found = method.evaluate(method.vit, {}, held_out, 5)
    assert found == {"top1": pytest.approx(100 * right / 11)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"loss": "mse"}, "bce or ce"), ({"smoothing": 0.1}, "every class a target")],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        DeiT3Config(**settings)


def test_a_model_of_other_classes_is_refused(class_folders):
    images = open_image_set(class_folders / "train")
    with pytest.raises(ValueError, match="4 classes, the model 5"):
        DeiT3Config().augmentation(dataclasses.replace(CONFIG.model, num_classes=5), images)
