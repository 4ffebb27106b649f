"""Zero-shot classification, against open_clip's own on the same weights and images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import vitreg
from peers import perturb
from probes.small import small_vit, validation
from vitreg.checkpoints.from_open_clip import from_open_clip
from vitreg.checkpoints.text_tower import TextTower
from vitreg.images import Subset, open_image_set, spaced_indices
from vitreg.probes import FeaturesConfig, extract
from vitreg.probes.tasks.templates import class_names
from vitreg.probes.tasks.text_encoders import OpenClipText, load_text_encoder
from vitreg.probes.tasks.zero_shot import ZeroShotConfig, class_embeddings, image_embeddings, zero_shot

open_clip = pytest.importorskip("open_clip")

NUM_IMAGES = 24
VISION = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 16, "image_size": 64}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
KINDS = {
    "CLIP": (open_clip.CLIP, {**VISION}, TEXT),
    "SigLIP": (
        open_clip.CustomTextCLIP,
        {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 64, "timm_pool": "map", "timm_proj": "none"},
        {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    ),
}
SIGLIP_SIZES = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
STORED = FeaturesConfig(dtype="float32", patches=0)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """A small open_clip model, every parameter of which counts."""
    kind, vision, text = KINDS[request.param]
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:  # SigLIP's image tower is timm's, whose sizes open_clip leaves alone
        patch.setattr("timm.create_model", lambda name, **options: create(name, **options, **SIGLIP_SIZES))
        return perturb(kind(48, vision, text))


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=TEXT["context_length"])


@torch.no_grad()
def test_logits_are_open_clips(model, tokenizer, test_data, tmp_path):
    """Its embeddings of classes and images are multiplied in the same test."""
    vit, images = from_open_clip(model), validation(test_data, NUM_IMAGES)
    names = class_names(images.classes)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES)
    pixels = torch.stack([vit.preprocess(images.image(i)) for i in range(NUM_IMAGES)])
    expected = model.encode_image(pixels, normalize=True) @ theirs
    images.labels = _half_right(expected)

    store, text = extract(vit, images, tmp_path, STORED), OpenClipText(model, tokenizer)
    ours = image_embeddings(store, vit) @ class_embeddings(text, names, ZeroShotConfig()).T
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert expected.std() > 1e-3  # images and classes differ by more than the tolerance

    found = zero_shot(store, vit, text)
    labels = torch.tensor(images.labels)
    top1, top5 = found.scores
    np.testing.assert_array_equal(top1.sums[:, 0], np.arange(NUM_IMAGES) % 2 == 0)
    np.testing.assert_array_equal(top5.sums[:, 0], (expected.topk(5).indices == labels[:, None]).any(1).numpy())
    assert (top1.unit, top5.value) == ("%", 100 * top5.sums[:, 0].mean())


def test_a_trained_text_tower(test_data, tmp_path):
    """Ours, as a run of the clip recipe leaves it beside its model; every step spelled out."""
    config = dataclasses.replace(small_vit().config, num_classes=24, head_bias=False)
    vit = perturb(vitreg.VisionTransformer(config))
    tower = perturb(TextTower(embed_dim=24, width=32, layers=2, heads=2, context_length=16))
    tensors = {key: tensor.contiguous() for key, tensor in tower.state_dict().items()}
    save_file(tensors, tmp_path / "text.safetensors", tower.metadata)
    vitreg.save(vit, tmp_path / "model.safetensors")

    images = validation(test_data, NUM_IMAGES)
    names = [f"{name} {number}" for number, name in enumerate(class_names(images.classes))]
    templates = ("a photo of a {}.", "the {}")
    with torch.no_grad():
        pixels = torch.stack([vit.preprocess(images.image(i)) for i in range(NUM_IMAGES)])
        embedded = vit.classify(pixels)
        cosines = torch.zeros(NUM_IMAGES, len(names))
        for column, name in enumerate(names):
            both = [tower(tower.tokenize([template.format(name)]))[0] for template in templates]
            mean = sum(one / one.norm() for one in both)
            cosines[:, column] = torch.cosine_similarity(embedded, mean[None])
    images.labels = _half_right(cosines)
    store = extract(vit, images, tmp_path / "store", STORED)
    found = zero_shot(store, vit, load_text_encoder(tmp_path), names, ZeroShotConfig(templates))
    np.testing.assert_array_equal(found.scores[0].sums[:, 0], np.arange(NUM_IMAGES) % 2 == 0)
    assert found.details["templates"] == list(templates)
    for source in (tmp_path / "text.safetensors", tmp_path / "model.safetensors"):
        assert isinstance(load_text_encoder(source), type(load_text_encoder(tmp_path)))


def test_text_towers_of_a_machine_without_a_network(tmp_path, monkeypatch):
    """The whole state dict lies where `vitreg.load` looks for image towers, and open_clip loads the rest."""
    small = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", small)
    theirs = perturb(open_clip.CLIP(24, VISION, TEXT))
    save_file(
        {k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "open_clip--small--own.safetensors"
    )
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(tmp_path))
    sentences = ["a photo of a dog.", "a goldfish"]
    with torch.no_grad():
        expected = theirs.encode_text(open_clip.get_tokenizer("small")(sentences))
    torch.testing.assert_close(load_text_encoder("open_clip:small/own").encode(sentences), expected)


def test_sources_without_a_text_tower(tmp_path):
    with pytest.raises(ValueError, match="open_clip has no architecture 'ViT-Q'"):
        load_text_encoder("open_clip:ViT-Q/openai")
    with pytest.raises(ValueError, match=r"dinov2_vits14 has no text tower; .* open_clip:ARCH/PRETRAINED"):
        load_text_encoder("dinov2_vits14")


def test_names_of_classes():
    assert class_names(("golden_retriever", "goldfish, Carassius auratus")) == ("golden retriever", "goldfish")
    ids = tuple(f"n{number:08d}" for number in range(1000))
    assert class_names(ids)[:2] == ("tench", "goldfish")
    for wordless in (ids[:100], ("0", "1", "2")):
        with pytest.raises(ValueError, match=rf"'{wordless[0]}' is no word .* give the {len(wordless)} class names"):
            class_names(wordless)


def test_refusals(test_data, tmp_path):
    vit, images = small_vit(), validation(test_data, 4)
    store, text = extract(vit, images, tmp_path / "store", STORED), _Constant(8)
    with pytest.raises(ValueError, match=r"2 class names are given, but .* has 100 classes"):
        zero_shot(store, vit, text, ("dog", "cat"))
    with pytest.raises(ValueError, match="features of another model, small"):
        zero_shot(store, small_vit(seed=1), text)
    with pytest.raises(ValueError, match="small embeds images in 48 dimensions and the text tower sentences in 8"):
        zero_shot(store, vit, text)
    embeddings = _Constant(48)
    embeddings.encode = lambda sentences: torch.full((len(sentences), 48), torch.nan)
    with pytest.raises(ValueError, match="the embedding of a class is not finite"):
        zero_shot(store, vit, embeddings)
    for templates, sentence in (("best", "choose openai or simple"), (("a photo",), "must have {}"), ((), "must have")):
        with pytest.raises(ValueError, match=sentence):
            zero_shot(store, vit, text, config=ZeroShotConfig(templates))
    photographs = open_image_set(test_data / "imagenet-samples")
    assert photographs.labels is None
    unlabeled = extract(vit, Subset(photographs, spaced_indices(1000, 4)), tmp_path / "unlabeled", STORED)
    with pytest.raises(ValueError, match="has no labels; zero-shot classification needs images with classes"):
        zero_shot(unlabeled, vit, text)


def _half_right(logits: torch.Tensor) -> list[int]:
    """Labels with which every other image is right, and the others are not."""
    best, other = logits.argmax(1), logits.argsort(1)[:, -3]
    return torch.where(torch.arange(len(best)) % 2 == 0, best, other).tolist()


class _Constant:
    """Embeds everything alike."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, sentences):
        return torch.ones(len(sentences), self.width)
