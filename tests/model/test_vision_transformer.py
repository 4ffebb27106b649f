"""The model itself: registers, training, sizes, precision, copies."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from peers import TOLERANCE, error, perturb, random_images, timm_model
from vitreg import Tokens, VisionTransformer, ViTConfig, from_timm

SMALL = dict(embed_dim=32, depth=2, num_heads=2, mlp_dim=64, patch_size=8, image_size=(32, 32))


def small(**options) -> VisionTransformer:
    return VisionTransformer(ViTConfig(**{**SMALL, **options}))


# --- registers ------------------------------------------------------------------------------------


def distance(registers: torch.Tensor) -> float:
    """The smallest distance between two registers."""
    return min(float((a - b).norm()) for a, b in itertools.combinations(registers[0].detach(), 2))


def test_transformers_d2_registers_stay_distinct_in_training():
    """D2: registers that start equal receive equal gradients and stay equal for ever (timm PR #2229)."""
    vit, images = small(num_registers=4, num_classes=5).train(), random_images(32, batch=8)
    assert distance(vit.registers) > 0.05
    clones = small(num_registers=4, num_classes=5).train()
    clones.load_state_dict(vit.state_dict())
    with torch.no_grad():
        clones.registers.zero_()  # as transformers starts them
    for model in (vit, clones):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(5):
            loss = nn.functional.cross_entropy(model.classify(images), torch.arange(8) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert distance(vit.registers) > 0.05
    assert distance(clones.registers) < 1e-4  # the defect that this guards against


@torch.no_grad()
@pytest.mark.parametrize("pool", ["mean", "token+mean", "attention", "token"])
def test_transformers_issue_37817_registers_are_not_pooled(pool):
    """D9: the pooled feature does not depend on the register states."""
    vit = perturb(small(num_registers=4, num_classes=5, pool=pool, pool_heads=2))
    tokens = vit(random_images(32))
    other = dataclasses.replace(tokens, registers=torch.randn_like(tokens.registers) * 100)
    assert torch.equal(vit.pool(tokens), vit.pool(other))
    moved = dataclasses.replace(tokens, patches=tokens.patches + 1, cls=tokens.cls + 1)
    assert error(vit.pool(tokens), vit.pool(moved)) > 0.01
    if pool == "mean":
        assert error(vit.pool(tokens), tokens.patches.mean(1)) == 0


@torch.no_grad()
def test_registers_take_part_in_attention_and_get_no_position():
    vit, images = perturb(small(num_registers=2)), random_images(32)
    expected = vit(images)
    vit.registers += torch.randn_like(vit.registers)
    assert error(vit(images).patches, expected.patches) > 1e-3
    a, b = vit.registers[0].clone()  # in the other order they are the same, as tokens without a place
    before = vit(images)
    vit.registers.copy_(torch.stack([b, a])[None])
    after = vit(images)
    assert error(after.patches, before.patches) <= TOLERANCE
    assert error(after.registers.flip(1), before.registers) <= TOLERANCE


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture):
    vit = from_timm(timm_model(architecture, img_size=112)).train()
    images = random_images(112)

    def gradients() -> dict[str, torch.Tensor]:
        vit.zero_grad()
        vit.classify(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}

    plain = gradients()
    vit.gradient_checkpointing = True
    calls = []
    vit.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    again = gradients()
    assert len(calls) == 2  # once more in the backward pass
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), name


def test_gradients_equal_timms():
    model = timm_model("vit_small_patch14_reg4_dinov2", img_size=70)
    vit, images = from_timm(model), random_images(98)
    vit.classify(images).square().sum().backward()
    model(images).square().sum().backward()
    theirs = dict(model.named_parameters())
    for ours, name in {
        "registers": "reg_token",
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.weight": "patch_embed.proj.weight",
        "blocks.0.ls1": "blocks.0.ls1.gamma",
        "blocks.1.attn.qkv.weight": "blocks.1.attn.qkv.weight",
        "head.weight": "head.weight",
    }.items():
        assert error(vit.get_parameter(ours).grad, theirs[name].grad) <= 1e-4, ours


def test_it_learns():
    vit = small(num_registers=2, num_classes=4).train()
    images, classes = random_images(32, batch=8), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(vit.classify(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2
    assert losses[-1] < 0.1


def test_a_fresh_model_is_initialized_as_it_says():
    vit = small(num_registers=3, num_classes=4, layer_scale=True, embed_dim=64, pool="attention")
    for name, parameter in vit.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith(("ls1", "ls2")):
            assert (parameter == 1e-5).all(), name
        else:
            expected = 64**-0.5 if "latent" in name else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.3), name


# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 33, 32), "images are 33 x 32 pixels; both sides must be multiples of the patch size 8"),
        ((1, 3, 32, 4), "images are 32 x 4 pixels; .*the patch size 8"),
        ((1, 3, 0, 32), "images are 0 x 32 pixels"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "classify", "trace"])
def test_sides_that_are_no_multiples_of_the_patch_size_are_refused(shape, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(small(num_classes=2), method)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 3, 32, 32), (1, 1, 32, 32), (1, 4, 32, 32), (1, 32, 32, 3)])
def test_what_is_no_batch_of_rgb_images_is_refused(shape):
    with pytest.raises(ValueError, match=r"images have shape \[.*\]; expected \[B, 3, H, W\]"):
        small()._run(torch.zeros(shape), None)  # inside: the tests' own shape check would come first


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one():
    vit, images = from_timm(timm_model("vit_small_patch14_reg4_dinov2", img_size=70)), random_images(98, batch=3)
    together = vit(images).sequence()
    for image, expected in zip(images, together, strict=True):
        assert error(vit(image[None]).sequence()[0], expected) <= 1e-5


@torch.no_grad()
def test_an_empty_batch_and_one_patch():
    vit = small(num_registers=2, num_classes=3).eval()
    assert vit(torch.zeros(0, 3, 32, 32)).patches.shape == (0, 16, 32)
    assert vit.classify(torch.zeros(0, 3, 32, 32)).shape == (0, 3)
    tokens = vit(random_images(8, batch=1))
    assert (tokens.grid, tokens.patches.shape) == ((1, 1), (1, 1, 32))


def test_without_a_head_there_are_no_classes():
    with pytest.raises(ValueError, match=r"no classification head; use vit\(images\)"):
        small().classify(random_images(32))


@torch.no_grad()
def test_the_grid_is_rows_and_columns_in_this_order():
    """A mark in the image's upper right corner is in the last column of the first row."""
    vit = perturb(small(depth=1))
    images = torch.zeros(1, 3, 24, 40)
    marked = images.clone()
    marked[:, :, :8, -8:] = 5.0
    change = (vit.trace(marked, embeddings=True).embeddings - vit.trace(images, embeddings=True).embeddings).norm(
        dim=-1
    )
    assert change.nonzero().tolist() == [[0, 4]]
    assert vit(marked).grid == (3, 5)


# --- precision, copies, devices -------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["deit3_small_patch16_224", "vit_small_patch16_dinov3_qkvb"])
def test_autocast_runs_in_bfloat16(architecture):
    vit, images = from_timm(timm_model(architecture)), random_images(96)
    with torch.no_grad():
        expected = vit(images).patches
        with torch.autocast("cpu", torch.bfloat16):
            tokens = vit(images)
            trace = vit.trace(images, attention_from="cls", facets=("keys",))
    assert error(tokens.patches, expected) < 0.05
    assert not torch.equal(tokens.patches, expected)
    assert torch.equal(trace.tokens.patches, tokens.patches)
    assert trace.keys.patches.dtype == torch.bfloat16
    assert vit.patch_embed.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = vit.train().classify(images).float().square().mean()
    loss.backward()
    assert torch.isfinite(vit.blocks[0].attn.qkv.weight.grad).all()


@torch.no_grad()
def test_images_are_converted_to_the_models_precision():
    vit = small().to(torch.bfloat16)
    assert vit(random_images(32)).patches.dtype == torch.bfloat16
    assert small().double()(random_images(32)).cls.dtype == torch.float64


@torch.no_grad()
def test_copies_are_independent_and_equal():
    vit, images = perturb(small(num_registers=2)), random_images(32)
    expected = vit(images).sequence()
    clone, loaded = copy.deepcopy(vit), VisionTransformer(vit.config).eval()
    loaded.load_state_dict(vit.state_dict())
    for other in (clone, loaded):
        assert torch.equal(other(images).sequence(), expected)
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(vit(images).sequence(), expected)


def test_a_model_without_memory_can_be_built_and_run():
    with torch.device("meta"):
        vit = small(num_registers=2, num_classes=3)
    assert all(parameter.is_meta for parameter in vit.parameters())
    tokens = vit(torch.empty(2, 3, 32, 32, device="meta"))
    assert tokens.patches.shape == (2, 16, 32)
    rope = from_timm(timm_model("vit_small_patch16_dinov3_qkvb")).to("meta")
    assert rope(torch.empty(1, 3, 96, 96, device="meta")).patches.is_meta
    assert rope.to_empty(device="cpu")(random_images(96)).patches.device.type == "cpu"


def test_a_forward_pass_returns_named_tokens():
    vit = small(num_registers=2)
    tokens = vit(random_images(32, 24))
    assert isinstance(tokens, Tokens)
    assert tokens.normed
    assert (vit.num_registers, vit.preprocess) == (2, vit.config.preprocess)
    assert not small(final_norm=False, pool="mean", fc_norm=True)(random_images(32)).normed
