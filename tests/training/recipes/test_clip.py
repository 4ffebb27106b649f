"""CLIP: towers, loss and retrieval against open_clip's and against literal code; one batch over two processes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import random
import sys

import open_clip
import pytest
import timm
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from open_clip.loss import ClipLoss
from safetensors import safe_open
from safetensors.torch import save_file

import vitreg
from peers import error, perturb, random_images
from training.captioned import CONFIG, MODEL, Photographs, tiny_method
from training.contrastive_ranks import Noise, random_batch, seeded_method, two_steps
from vitreg.checkpoints.text_tower import TextTower, load_text_tower
from vitreg.training import clip
from vitreg.training.engine.method import Sample
from vitreg.training.engine.randomness import fixed_randomness
from vitreg.training.recipes.clip import CLIP, TEXT_SIZES, CLIPConfig
from vitreg.training.recipes.retrieval import recall
from vitreg.training.recipes.sizes import SIZES, sized


@pytest.fixture(scope="module")
def photographs(test_data) -> Photographs:
    return Photographs(test_data / "flickr8k-1k", 16)


@pytest.fixture
def method() -> CLIP:
    return tiny_method()


def test_loss_is_open_clips(method):
    perturb(method)
    batch = random_batch(8)
    scalars = method(batch, 0.0)
    images = F.normalize(method.vit.classify(batch["image"]), dim=-1)
    texts = F.normalize(method.text.text(batch["text"]), dim=-1)
    scale = method.text.logit_scale.exp()
    assert error(scalars["loss"], ClipLoss()(images, texts, scale)) < 1e-6
    assert scalars["logit_scale"] == scale
    right = [int((images[i] @ texts.T).argmax()) == i for i in range(8)]
    assert 0 < sum(right) < 8
    assert scalars["accuracy"] == 100 * sum(right) / 8


def test_loss_stays_in_float32_under_autocast(method):
    method.eval()
    batch = random_batch(8)
    with torch.autocast("cpu", torch.bfloat16):
        scalars = method(batch, 0.0)
        images, texts = method.vit.classify(batch["image"]), method.text(batch["text"])
    assert images.dtype is texts.dtype is torch.bfloat16
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    assert error(scalars["loss"], ClipLoss()(images, texts, method.text.logit_scale.exp())) < 1e-6


PEERS = {
    "tiny": "ViT-S-16-alt",
    "small": "ViT-S-16",
    "base": "ViT-B-16",
    "large": "ViT-L-14",
    "huge": "ViT-H-14",
    "giant": "ViT-g-14",
}


@pytest.mark.parametrize("size", PEERS)
def test_sizes_are_open_clips(size):
    theirs = open_clip.get_model_config(PEERS[size])
    text = theirs["text_cfg"]
    config = clip(num_images=10**6, size=size)
    ours = config.method
    assert isinstance(ours, CLIPConfig)
    assert ours.text_width == config.model.num_classes == theirs["embed_dim"] == text["width"]
    assert (ours.text_layers, ours.text_heads) == (text["layers"], text["heads"])
    assert ours.context_length == text["context_length"]


def test_every_size_has_a_text_tower():
    assert TEXT_SIZES.keys() == SIZES.keys()
    with pytest.raises(ValueError, match="size 'enormous' is unknown"):
        inspect.unwrap(sized)("enormous", patch_size=16, image_size=224, num_registers=4)


def test_text_tower_is_open_clips(method):
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=24, width=32, heads=2, layers=2)
    theirs = perturb(open_clip.CustomTextCLIP(32, vision, text, nonscalar_logit_scale=True))
    missing, unexpected = method.text.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith("visual.") for key in unexpected)
    captions = ["A dog runs.", "two children in a pink boat " * 9]
    tokens = open_clip.get_tokenizer("ViT-B-32")(captions, context_length=24)
    assert torch.equal(method.text.tokenize(captions), tokens)
    assert error(method.text(tokens), theirs.encode_text(tokens)) < 1e-6


def test_two_processes_equal_one(tmp_path):
    mp.spawn(two_steps, (2, tmp_path), nprocs=2)
    method = seeded_method()
    figures = method.evaluate(method.vit, {"text": method.text.state_dict()}, Noise(), 4)
    scalars = method(random_batch(8), 0.0)
    scalars["loss"].backward()
    expected = scalars | {name: parameter.grad for name, parameter in method.named_parameters()}
    for sharding in ("ddp", "fsdp"):
        outcome = torch.load(tmp_path / f"{sharding}.pt")
        assert outcome.pop("figures") == pytest.approx(figures)
        assert outcome.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith(("qkv.bias", "in_proj_bias")):
                # The softmax does not see the keys' bias: its gradient is rounding alone.
                queries, _, values = value.chunk(3)
                theirs = outcome[name].chunk(3)
                assert error(theirs[0], queries) < 1e-5
                assert error(theirs[2], values) < 1e-5
            else:
                assert error(outcome[name], value) < 1e-5, (sharding, name)


def views_batch(photographs: Photographs, **options) -> dict[str, torch.Tensor]:
    views = dataclasses.replace(CONFIG, **options).augmentation(MODEL, photographs)
    samples = [Sample(photographs.image(i), None, photographs.captions(i)) for i in range(len(photographs))]
    return torch.utils.data.default_collate([views(sample) for sample in samples])


def test_a_few_steps_on_photographs(method, photographs):
    with fixed_randomness(0):
        batch = views_batch(photographs)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    losses = []
    for number in range(25):
        scalars = method(batch, number / 25)
        optimizer.zero_grad()
        scalars["loss"].backward()
        if not number:
            gradients = method.vit.registers.grad[0]
            assert torch.pdist(gradients).min() > 0.1 * gradients.norm(dim=1).max()
        optimizer.step()
        method.after_step(number / 25)
        losses.append(scalars["loss"].item())
    assert abs(losses[0] - math.log(16)) < 1
    assert losses[-1] < 0.5 * math.log(16)  # which features that have collapsed would reach


def test_the_scale_stays_within_open_clips_bounds(method):
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        method.text.logit_scale.data.fill_(value)
        method.after_step(0.5)
        assert method.text.logit_scale.item() == pytest.approx(kept)
    assert tiny_method().text.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_views(photographs):
    views = CONFIG.augmentation(MODEL, photographs)
    sample = Sample(photographs.image(0), None, photographs.captions(0))
    row = views(sample)
    assert row["image"].shape == (3, 64, 64)
    tokens = open_clip.tokenize(list(sample.captions), 24)
    seen = {int((tokens == views(sample)["text"]).all(1).nonzero()) for _ in range(60)}
    assert seen == set(range(5))
    random.seed(3), torch.manual_seed(3)
    first = views(sample)
    random.seed(3), torch.manual_seed(3)
    again = views(sample)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_crop_is_open_clips(photographs):
    theirs = open_clip.image_transform((64, 64), True, mean=MODEL.preprocess.mean, std=MODEL.preprocess.std)
    views = CONFIG.augmentation(MODEL, photographs)
    image = photographs.image(1)
    torch.manual_seed(5)
    expected = theirs(image)
    torch.manual_seed(5)
    assert error(views(Sample(image, None, ("a",)))["image"], expected) < 1e-5


def test_flip_and_scale(photographs):
    image = photographs.image(1)
    flipped = dataclasses.replace(CONFIG, flip=1.0, min_scale=1.0).augmentation(MODEL, photographs)
    plain = dataclasses.replace(CONFIG, min_scale=1.0).augmentation(MODEL, photographs)
    torch.manual_seed(5)
    one = flipped(Sample(image, None, ("a",)))["image"]
    torch.manual_seed(5)
    assert torch.equal(plain(Sample(image, None, ("a",)))["image"].flip(-1), one)


def literal_recall(similarity: torch.Tensor, owners: list[int]) -> dict[str, float]:
    num_images, num_captions = similarity.shape
    figures = {}
    for k in (1, 5):
        right = 0
        for i in range(num_images):
            best = sorted(range(num_captions), key=lambda c: -float(similarity[i, c]))[:k]
            right += any(owners[c] == i for c in best)
        figures[f"image_to_text_r{k}"] = 100 * right / num_images
        right = 0
        for c in range(num_captions):
            best = sorted(range(num_images), key=lambda i: -float(similarity[i, c]))[:k]
            right += owners[c] in best
        figures[f"text_to_image_r{k}"] = 100 * right / num_captions
    return figures


def test_recall():
    owners = [0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    similarity = torch.randn(8, len(owners))
    similarity[owners, range(len(owners))] += 1
    figures = recall(similarity, torch.tensor(owners))
    assert figures == pytest.approx(literal_recall(similarity, owners))
    assert 0 < figures["image_to_text_r1"] < figures["image_to_text_r5"] < 100
    assert set(recall(torch.eye(2), torch.tensor([0, 1])).values()) == {100.0}


class Damaged(Photographs):
    """The third image cannot be read, and the fifth has no captions."""

    def image(self, index):
        if index == 2:
            raise vitreg.ImageError("damaged")
        return super().image(index)

    def captions(self, index):
        return () if index == 4 else super().captions(index)


@torch.no_grad()
def test_evaluate_takes_what_there_is(method, test_data):
    perturb(method)
    images = Damaged(test_data / "flickr8k-1k", 9)
    kept = [i for i in range(9) if i not in (2, 4)]
    features = torch.stack([method.vit.preprocess(images.image(i)) for i in kept])
    similarity = F.normalize(method.vit.classify(features), dim=-1)
    texts = open_clip.tokenize([caption for i in kept for caption in images.captions(i)], 24)
    similarity = similarity @ F.normalize(method.text(texts), dim=-1).T
    owners = [row for row, i in enumerate(kept) for _ in images.captions(i)]
    expected = literal_recall(similarity, owners)
    extra_modules = {"text": method.text.state_dict()}
    assert method.evaluate(method.vit, extra_modules, images, 4) == pytest.approx(expected)
    assert expected["text_to_image_r5"] > 0
    images.files = images.files[2:3]
    images.sentences = {0: ()}
    assert method.evaluate(method.vit, extra_modules, images, 4) == {}


@pytest.mark.parametrize("num_registers", [0, 4])
def test_image_tower_in_other_formats(tmp_path, num_registers):
    method = CLIP(dataclasses.replace(MODEL, num_registers=num_registers), CONFIG)
    vit = perturb(method.vit)
    vitreg.save(vit, tmp_path / "timm.safetensors", format="timm")
    vitreg.save(vit, tmp_path / "folder", format="transformers")
    with safe_open(tmp_path / "timm.safetensors", framework="pt") as file:
        metadata = file.metadata()
    kwargs = json.loads(metadata["kwargs"])
    theirs = timm.create_model(
        metadata["architecture"], **kwargs, checkpoint_path=str(tmp_path / "timm.safetensors")
    ).eval()
    kind = json.loads((tmp_path / "folder" / "config.json").read_text())["architectures"][0]
    hf = getattr(transformers, kind).from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        ours = vit.classify(random_images(64))
        assert error(theirs(random_images(64)), ours) < 1e-5
        assert error(hf(random_images(64)).logits, ours) < 1e-5
        assert error(vitreg.load(tmp_path / "folder").classify(random_images(64)), ours) < 1e-5


def test_text_tower_from_its_file(method, tmp_path):
    extra_modules = perturb(method).extra_modules()
    assert set(extra_modules) == {"text"}
    path = tmp_path / "text.safetensors"
    save_file(extra_modules["text"].state_dict(), path, extra_modules["text"].metadata)
    state = torch.get_rng_state()
    tower = load_text_tower(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(tower, TextTower)
    tokens = tower.tokenize(["A dog runs.", "A boat."])
    assert torch.equal(tower(tokens), method.text(tokens))
    assert torch.equal(tower.logit_scale, method.text.logit_scale)
    with pytest.raises(vitreg.CheckpointError, match="does not say which architecture"):
        vitreg.load(path)


def test_a_file_that_is_no_text_tower(method, tmp_path):
    vitreg.save(method.vit, tmp_path / "vit.safetensors")
    with pytest.raises(vitreg.CheckpointError, match="no text tower"):
        load_text_tower(tmp_path / "vit.safetensors")
    with pytest.raises(vitreg.CheckpointError, match="not a file"):
        load_text_tower(tmp_path / "missing.safetensors")
    path = tmp_path / "text.safetensors"
    state, metadata = method.text.state_dict(), method.text.metadata
    save_file(state, path, metadata | {"config": json.dumps(json.loads(metadata["config"]) | {"layers": 3})})
    with pytest.raises(vitreg.CheckpointError, match="missing keys"):
        load_text_tower(path)
    save_file(state, path, metadata | {"config": json.dumps(json.loads(metadata["config"]) | {"width": 64})})
    with pytest.raises(vitreg.CheckpointError, match="damaged or from a newer"):
        load_text_tower(path)
    save_file(state, path, metadata | {"config": '{"mystery": 1}'})
    with pytest.raises(vitreg.CheckpointError, match="damaged or from a newer"):
        load_text_tower(path)


def test_images_without_captions_are_refused(photographs, test_data):
    images = Photographs(test_data / "flickr8k-1k", 3)
    images.sentences[1] = ()
    with pytest.raises(ValueError, match=f"1 of the 3 images .* the first is {images.name(1)}"):
        CONFIG.augmentation(MODEL, images)
    images.sentences = dict.fromkeys(range(3), ())
    with pytest.raises(ValueError, match=r"no captions, which clip learns from; give images with a captions.csv"):
        CONFIG.augmentation(MODEL, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_width": 65}, "not a multiple of text_heads 2"),
        ({"context_length": 2}, "context_length is 2"),
        ({"min_scale": 0.0}, "min_scale 0.0 must be above 0"),
        ({"flip": 2.0}, "flip 2.0"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def test_a_model_without_projection_is_refused():
    with pytest.raises(ValueError, match="give it num_classes=32"):
        CONFIG.build(dataclasses.replace(MODEL, num_classes=0))


def test_without_open_clip_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r'pip install "vitreg\[clip\]"'):
        CONFIG.build(MODEL)
