"""Parity with open_clip: the same weights, the same images, the peer run in the same test."""

import pytest
import torch

from vitreg.checkpoints.from_open_clip import from_open_clip
from vitreg.checkpoints.state import CheckpointError
from vitreg.images import bundled_photographs, read_image

open_clip = pytest.importorskip("open_clip")

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 14, "image_size": 56}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TOLERANCE = 1e-5


def perturb(model: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """Every parameter away from its initial value: tokens, positions, norms, biases and LayerScale count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip(kind="CLIP", quick_gelu=False, **vision):
    return perturb(getattr(open_clip, kind)(24, {**VISION, **vision}, TEXT, quick_gelu=quick_gelu))


def images(height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / theirs.norm()) <= tolerance


def at_size(model: torch.nn.Module, height: int, width: int) -> torch.nn.Module:
    """The same weights in a tower for another size, as `create_model(force_image_size=...)` makes it."""
    resized = open_clip.CLIP(24, {**VISION, "image_size": (height, width)}, TEXT)
    state = model.state_dict()
    open_clip.model.resize_pos_embed(state, resized)
    resized.load_state_dict(state)
    return resized.eval()


VARIANTS = {
    "plain": {},
    "quick gelu": {"quick_gelu": True},
    "layer scale": {"ls_init_value": 0.1},
    "no ln_pre": {"no_ln_pre": True},
    "mean of patches": {"pool_type": "avg"},
    "norm after pooling": {"final_ln_after_pool": True},
    "mean, then norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "sin-cos positions": {"pos_embed_type": "sin_cos_2d"},
    "patch dropout": {"patch_dropout": 0.5},
    "qk norm": {"qk_norm": True},
    "inner norms": {"scale_attn_inner": True, "scale_fc": True},
    "attentional pool": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3},
    "not square": {"image_size": (56, 84)},
    "tanh gelu, own epsilon": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
}


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_embedding(variant, kind):
    theirs = clip(kind, **VARIANTS[variant])
    x = images(*theirs.visual.image_size)
    vit = from_open_clip(theirs)
    close(vit.classify(x), theirs.encode_image(x))
    close(from_open_clip(theirs.visual).classify(x), theirs.visual(x))
    assert vit.preprocess.size == theirs.visual.image_size


@torch.no_grad()
def test_a_pool_as_wide_as_its_tokens_and_cocas_own_class():
    """`nn.MultiheadAttention` then holds one fused projection."""
    options = {**VISION, **VARIANTS["attentional pool"], "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    theirs = perturb(open_clip.CoCa(32, {**TEXT, "attn_pooler_heads": 2}, text, options))
    vit, x = from_open_clip(theirs), images()
    pooled, _ = theirs.visual(x)
    close(vit.classify(x), pooled)


@pytest.mark.parametrize("variant", ["plain", "norm after pooling", "mean of patches", "mean, then norm"])
@torch.no_grad()
def test_tokens_are_those_that_are_pooled(variant):
    theirs = clip(output_tokens=True, **VARIANTS[variant]).visual
    vit, x = from_open_clip(theirs), images()
    tokens = vit(x)
    _, patches = theirs(x)
    close(tokens.patches, patches)
    hidden = theirs.transformer(theirs._embeds(x))
    if not theirs.final_ln_after_pool:
        hidden = theirs.ln_post(hidden)
    close(tokens.cls, hidden[:, 0])
    assert tokens.normed is not theirs.final_ln_after_pool
    close(vit.pool(tokens), theirs._pool(theirs.transformer(theirs._embeds(x)))[0])


@pytest.mark.parametrize("size", [(98, 98), (42, 70), (28, 56)])
@torch.no_grad()
def test_positions_at_other_sizes(size):
    theirs = clip()
    x = images(*size)
    expected = at_size(theirs, *size)
    # open_clip takes the old grid to be square and the new one as it is.
    close(from_open_clip(theirs).classify(x), expected.encode_image(x))


def timm_tower(**options):
    vision = {
        "timm_model_name": "vit_tiny_patch16_224",
        "image_size": 224,
        "timm_pool": "token",
        "timm_proj": "linear",
    }
    # These are twelve and more blocks deep; larger weights would amplify rounding without bound.
    return perturb(open_clip.CustomTextCLIP(24, {**vision, **options}, TEXT), scale=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timm_pool": "avg", "timm_proj_bias": True},
        {"timm_proj": ""},
        {"timm_proj": "none"},
        {"timm_model_name": "vit_pwee_patch16_reg1_gap_256", "image_size": 256, "timm_pool": "avg"},
    ],
)
@torch.no_grad()
def test_timm_towers(options):
    theirs = timm_tower(**options)
    side = theirs.visual.image_size[0]
    vit, x = from_open_clip(theirs), images(side, side)
    expected = theirs.encode_image(x)
    ours = vit.classify(x) if vit.head is not None else vit.pool(vit(x))
    close(ours, expected)


def test_mlp_projection_is_refused():
    with pytest.raises(CheckpointError, match="projection"):
        from_open_clip(timm_tower(timm_proj="mlp"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attentional_pool": "parallel"}, "attentional pooling"),
        ({"pool_type": "none"}, "pool_type='none'"),
        ({"scaled_cosine_attn": True}, "cosine"),
        ({"scale_heads": True}, "heads"),
        ({"scale_attn": True}, "norm after its attention"),
    ],
)
def test_what_vitreg_lacks_is_refused(options, message):
    with pytest.raises(CheckpointError, match=message):
        from_open_clip(clip(**options))


def test_other_towers_are_refused():
    resnet = open_clip.CLIP(24, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 64, "head_width": 8}, TEXT)
    with pytest.raises(CheckpointError, match="not a ModifiedResNet"):
        from_open_clip(resnet)
    with pytest.raises(CheckpointError, match="Linear has no image tower"):
        from_open_clip(torch.nn.Linear(1, 1))


def test_preprocessing_is_that_of_the_checkpoint():
    theirs = clip()
    assert from_open_clip(theirs).preprocess.mean == open_clip.OPENAI_DATASET_MEAN
    cfg = {
        "size": (56, 56),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    open_clip.set_model_preprocess_cfg(theirs, cfg)
    preprocess = from_open_clip(theirs).preprocess
    assert (preprocess.mean, preprocess.interpolation, preprocess.crop) == ((0.5,) * 3, "bilinear", "squash")
    open_clip.set_model_preprocess_cfg(theirs, cfg | {"resize_mode": "longest"})
    assert from_open_clip(theirs).preprocess.crop == "border"


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocess_equals_open_clips_transform(mode):
    """Up to the rounding of single pixels."""
    theirs = clip(image_size=112)
    cfg = {
        "size": 112,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bicubic",
        "resize_mode": mode,
    }
    open_clip.set_model_preprocess_cfg(theirs, cfg)
    image = read_image(bundled_photographs()[0]).crop((0, 0, 200, 300))
    expected = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**cfg), False)(image)
    close(from_open_clip(theirs).preprocess(image), expected, 1e-2)


def test_the_original_is_untouched():
    theirs = clip()
    vit = from_open_clip(theirs)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in theirs.visual.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP"])
@torch.no_grad()
def test_full_size(name):
    theirs = open_clip.create_model(name, pretrained=None).eval()
    vit, x = from_open_clip(theirs), images(224, 224)
    ours = vit.pool(vit(x)) if vit.head is None else vit.classify(x)
    close(ours, theirs.encode_image(x), 1e-4)
