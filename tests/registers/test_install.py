"""A fix in place, in the modules of timm, transformers and open_clip, against the fixed model itself."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn

import vitreg
from checkpoints import transformers_models
from checkpoints.test_from_timm import FAMILIES, timm_patch
from checkpoints.test_from_transformers_parts import LLAMA4
from checkpoints.test_from_transformers_parts import build as tower
from peers import TOLERANCE, at_size, error, perturb, random_images, timm_model
from vitreg.checkpoints.state import build


def fix(model: nn.Module | vitreg.VisionTransformer, *, weight: int = 3, start: int = 1) -> vitreg.VisionTransformer:
    """Trainable registers, test-time registers of several units, and a weight: all that can be installed."""
    fixed = vitreg.add_registers(model, 2)
    fixed = vitreg.add_test_time_registers(fixed, neurons=[(start, 1), (start, 5), (1, 7)], count=2)
    config = dataclasses.replace(fixed.config, register_weight=weight, register_start=start)
    return build(config, fixed.state_dict(), "the fixed model")


def without_added(fixed: vitreg.VisionTransformer, images: torch.Tensor, own: int = 0) -> torch.Tensor:
    """The sequence of the module: class token, its own registers, patches."""
    tokens = fixed(images)
    return dataclasses.replace(tokens, registers=tokens.registers[:, :own]).sequence()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_timm(family):
    architecture, options = FAMILIES[family]
    model = timm_model(architecture, **options)
    vit, patch = vitreg.from_timm(model), timm_patch(model)
    fixed = fix(vit)
    batches = [random_images(rows * patch, columns * patch, batch) for rows, columns, batch in ((7, 7, 2), (3, 5, 1))]
    before = [at_size(model, images)(images) for images in batches]
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with vitreg.install_registers(model, fixed):
        for images, old in zip(batches, before, strict=True):
            sized, expected = at_size(model, images), without_added(fixed, images, vit.num_registers)
            assert error(sized.forward_features(images), expected) <= TOLERANCE
            output = sized(images)
            assert error(output, fixed.pool(fixed(images)) if vit.head is None else fixed.classify(images)) <= TOLERANCE
            assert error(output, old) > 100 * TOLERANCE
            last, maps = sized.forward_intermediates(images, norm=True)
            assert maps[0].shape == maps[-1].shape == (len(images), 96, *fixed(images).grid)
            assert error(last, expected) <= TOLERANCE
        assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(at_size(model, images)(images), old) for images, old in zip(batches, before, strict=True))
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_intermediates_are_those_of_the_fixed_model():
    model = timm_model("vit_small_patch14_reg4_dinov2", img_size=98, depth=4)
    fixed, images = fix(model), random_images(98)
    expected = fixed.trace(images, patches=True).patches
    with vitreg.install_registers(model, fixed):
        maps = model.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
        assert all(error(ours, theirs) <= TOLERANCE for ours, theirs in zip(maps, expected, strict=True))
        features = model.get_intermediate_layers(images, n=2, return_prefix_tokens=True)
        assert features[0][1].shape == (2, 5, 96)


@torch.no_grad()
def test_real_vit(tiny_vit, test_data, photograph_batch):
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    timm.models.load_checkpoint(model, str(test_data / "weights" / f"{name}.safetensors"))
    model = model.eval()
    fixed = vitreg.add_test_time_registers(tiny_vit, neurons=[(7, 417), (6, 189), (5, 485)])
    before = model(photograph_batch)
    with vitreg.install_registers(model, fixed) as handle:
        assert error(model.forward_features(photograph_batch), without_added(fixed, photograph_batch)) <= TOLERANCE
        assert error(model(photograph_batch), fixed.classify(photograph_batch)) <= TOLERANCE
        norms = torch.stack(model.forward_intermediates(photograph_batch, intermediates_only=True)).norm(dim=2)
        assert norms.amax() < 150 < tiny_vit.trace(photograph_batch).patch_norms.amax()
        model.reset_classifier(10)  # fine-tuning changes the head, not what the fix is of
        assert model(photograph_batch[:2]).shape == (2, 10)
        handle.remove()
        handle.remove()
    model.reset_classifier(1000)
    model.head = copy.deepcopy(tiny_vit.head)
    assert torch.equal(model(photograph_batch), before)


def siglip2(**options):
    hf = transformers_models.hf
    return hf.Siglip2VisionModel(
        hf.Siglip2VisionConfig(**transformers_models.siglip2_config().vision_config.to_dict() | options)
    )


def hf_model(name: str, **options):
    hf, m = transformers_models.hf, transformers_models
    made = {
        "ViT": lambda: hf.ViTModel(hf.ViTConfig(**m.BASE, **m.MLP, **m.SQUARE, **options)),
        "Dinov2": lambda: hf.Dinov2Model(m.dinov2_config(False, **options)),
        "Dinov2WithRegisters": lambda: hf.Dinov2WithRegistersModel(m.dinov2_config(True, **options)),
        "Dinov2 SwiGLU": lambda: hf.Dinov2Model(m.dinov2_config(False, use_swiglu_ffn=True, **options)),
        "DINOv3": lambda: m.dinov3_model(use_gated_mlp=True, **options),
        "CLIP": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**m.BASE, **m.MLP, **m.SQUARE, **options)),
        "SigLIP": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**m.BASE, **m.MLP, **m.SQUARE, **options)),
        "BLIP": lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**m.BASE, **m.MLP, **m.SQUARE, **options)),
    }
    return transformers_models.perturb(made[name]())


HF = ["ViT", "Dinov2", "Dinov2WithRegisters", "Dinov2 SwiGLU", "DINOv3", "CLIP", "SigLIP", "BLIP"]


@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_transformers(name):
    model = hf_model(name, attn_implementation="eager")
    fixed, own = fix(model, start=0), vitreg.from_transformers(model).num_registers
    several = {"output_hidden_states": True, "output_attentions": True}
    resize = {} if name.startswith(("Dino", "DINO")) else {"interpolate_pos_encoding": True}
    for images in (transformers_models.images(56, 56), transformers_models.images(42, 70, batch=3)):
        before = model(images, **several, **resize)
        with vitreg.install_registers(model, fixed):
            after = model(images, **several, **resize)
            assert error(after.last_hidden_state, without_added(fixed, images, own)) <= TOLERANCE
            if after.pooler_output is not None and name != "ViT":  # ViTModel's pooler is no part of ours
                assert error(after.pooler_output, fixed.pool(fixed(images))) <= TOLERANCE
        for key in before:
            old, new = (value if isinstance(value, tuple) else (value,) for value in (before[key], after[key]))
            assert [tensor.shape for tensor in old] == [tensor.shape for tensor in new], key
        assert all(
            torch.equal(old, new)
            for old, new in zip(before.hidden_states, model(images, **several, **resize).hidden_states, strict=True)
        )


CLASSES = ("ViTMAE", "ViTMSN", "IJepa", "Tipsv2Vision", "MetaClip2Vision", "ChineseCLIPVision", "AltCLIPVision")
CLASSES += ("CLIPSegVision", "OwlViTVision", "Owlv2Vision", "GitVision", "Blip2Vision", "InstructBlipVision")
CLASSES += ("InstructBlipVideoVision", "FlavaImage", "Siglip2Vision", "JanusVision", "DPT")


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_other_classes_of_transformers(name):
    kind = getattr(transformers_models.hf, f"{name}Model", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}Model")
    sizes = {**transformers_models.BASE, **transformers_models.MLP, **transformers_models.SQUARE}
    other = {"mask_ratio": 0.0} if name == "ViTMAE" else {"num_patches": 16} if name == "Siglip2Vision" else {}
    model = transformers_models.perturb(kind(kind.config_class(**sizes, **other)))
    fixed, images = fix(model), transformers_models.images(56, 56)
    own = vitreg.from_transformers(model).num_registers
    inputs = {"pixel_values": images}
    if name == "ViTMAE":  # which shuffles patches, by this noise not
        inputs["noise"] = torch.arange(16.0).expand(2, -1)
    if name == "Siglip2Vision":
        patches = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, -1)
        inputs = {"pixel_values": patches, "spatial_shapes": torch.tensor([[4, 4]] * 2), "pixel_attention_mask": None}
    before = model(**inputs).last_hidden_state
    with vitreg.install_registers(model, fixed):
        assert error(model(**inputs).last_hidden_state, without_added(fixed, images, own)) <= TOLERANCE
    assert torch.equal(model(**inputs).last_hidden_state, before)


@pytest.mark.parametrize("last", [1, 3])
@torch.no_grad()
def test_tokens_that_are_last_in_the_module(last):
    """Llama 4 has its class token there and turns all tokens by RoPE, YOLOS its detection tokens."""
    if last == 1:
        model, images = tower("Llama4VisionModel", "llama4", **LLAMA4), transformers_models.images(56, 56)
        seen: list[torch.Tensor] = []
        model.layernorm_post.register_forward_hook(lambda _m, _i, output: seen.append(output))
    else:
        options = {"num_detection_tokens": last, "use_mid_position_embeddings": False}
        model, images = tower("YolosModel", "yolos", image_size=(56, 56), **options), transformers_models.images(42, 70)
        seen = []
        model.layernorm.register_forward_hook(lambda _m, _i, output: seen.append(output))
    fixed, own = fix(model), vitreg.from_transformers(model).num_registers
    model(images)
    with vitreg.install_registers(model, fixed):
        model(images)
    model(images)
    before, after, again = seen
    first = min(own, 1)  # YOLOS has its class token first
    rolled = torch.cat([after[:, :first], after[:, -last:], after[:, first:-last]], dim=1)
    assert error(rolled, without_added(fixed, images, own)) <= TOLERANCE
    assert torch.equal(before, again)
    assert not torch.equal(before, after)


@torch.no_grad()
def test_towers_of_whole_models():
    """The depth of Depth Anything changes with the fix of its backbone; so does what OWL-ViT detects with."""
    hf, m = transformers_models.hf, transformers_models
    backbone = hf.Dinov2Config(**m.BASE, **m.SQUARE, out_features=["stage2"], reshape_hidden_states=False)
    sizes = {"reassemble_factors": [1], "neck_hidden_sizes": [8], "fusion_hidden_size": 8, "reassemble_hidden_size": 32}
    depth = m.perturb(hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(backbone_config=backbone, **sizes)))
    fixed, images = fix(depth), m.images(42, 70)
    before = depth(images).predicted_depth
    with vitreg.install_registers(depth, fixed):
        assert error(depth.backbone(images).feature_maps[-1], without_added(fixed, images)) <= TOLERANCE
        after = depth(images).predicted_depth
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert torch.equal(depth(images).predicted_depth, before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_images_of_siglip2(attention):
    """What is padding has no say in which activation is the strongest, and registers do not attend to it."""
    model = transformers_models.perturb(siglip2(attn_implementation=attention))
    fixed = fix(model)
    grids = torch.tensor([[2, 3], [4, 4], [3, 4]])
    images = [transformers_models.images(14 * h, 14 * w, batch=1) for h, w in grids.tolist()]
    pixels, mask = 9 * torch.ones(3, 16, 588), torch.zeros(3, 16, dtype=torch.int32)
    for i, image in enumerate(images):
        patches = image.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 4, 5, 1).reshape(-1, 588)
        pixels[i, : len(patches)], mask[i, : len(patches)] = patches, 1
    with vitreg.install_registers(model, fixed):
        output = model(pixels, pixel_attention_mask=mask, spatial_shapes=grids)
    for i, image in enumerate(images):
        tokens = fixed(image)
        assert error(output.last_hidden_state[i : i + 1, : int(mask[i].sum())], tokens.patches) <= TOLERANCE
        assert error(output.pooler_output[i : i + 1], fixed.pool(tokens)) <= TOLERANCE


@torch.no_grad()
def test_both_towers_of_clip():
    """`get_image_features` of a whole CLIP, whose text tower stays alone."""
    hf = transformers_models.hf
    model = transformers_models.perturb(hf.CLIPModel(transformers_models.clip_config()))
    fixed, images = fix(model), transformers_models.images(56, 56)
    text = model.get_text_features(torch.arange(8).view(1, 8))
    with vitreg.install_registers(model, fixed):
        features = model.get_image_features(pixel_values=images)
        assert error(getattr(features, "pooler_output", features), fixed.classify(images)) <= TOLERANCE
        same = model.get_text_features(torch.arange(8).view(1, 8))
    assert torch.equal(getattr(same, "pooler_output", same), getattr(text, "pooler_output", text))


OPEN_CLIP = {
    "plain": {},
    "inner norms": {"scale_attn_inner": True, "scale_fc": True},
    "mean of patches": {"pool_type": "avg"},
    "layer scale": {"ls_init_value": 0.1},
    "tokens first": {"batch_first": False},
}


@pytest.mark.parametrize("variant", OPEN_CLIP)
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@torch.no_grad()
def test_open_clip(kind, variant):
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 14, "image_size": 56}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    options = dict(OPEN_CLIP[variant])
    model = getattr(open_clip, kind)(24, {**vision, **{k: v for k, v in options.items() if k != "batch_first"}}, text)
    perturb(model)
    if not options.get("batch_first", True):
        model.visual.transformer = tokens_first(model.visual.transformer)
    fixed, images = fix(model), random_images(56, batch=3)
    before = model.encode_image(images)
    with vitreg.install_registers(model, fixed):
        assert error(model.encode_image(images), fixed.classify(images)) <= TOLERANCE
        maps = model.visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"]
        assert {tuple(one.shape) for one in maps} == {(3, 32, 4, 4)}
    assert torch.equal(model.encode_image(images), before)
    with vitreg.install_registers(model.visual, fixed):
        assert error(model.encode_image(images), fixed.classify(images)) <= TOLERANCE


def tokens_first(transformer: nn.Module) -> nn.Module:
    """The same weights in open_clip's older order of axes."""
    from open_clip.transformer import Transformer

    other = Transformer(32, 2, 2, batch_first=False)
    other.load_state_dict(transformer.state_dict())
    return other.eval()


@torch.no_grad()
def test_timm_tower_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.timm_model.TimmModel("vit_tiny_patch16_224", 24, image_size=224)
    perturb(tower)
    fixed, images = fix(tower), random_images(224)
    with vitreg.install_registers(tower, fixed):
        assert error(tower(images), fixed.classify(images)) <= TOLERANCE


@torch.no_grad()
def test_tower_of_another_library_with_the_same_weights(tmp_path):
    """A fix of timm's DINOv2 in transformers' classifier, whose head is another."""
    vit = vitreg.from_timm(timm_model("vit_small_patch14_dinov2", img_size=56))
    vitreg.save(vit, tmp_path, format="transformers")
    model = transformers_models.hf.Dinov2ForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    fixed, images = fix(vit), random_images(56)
    with vitreg.install_registers(model, fixed):
        assert error(model.dinov2(images).last_hidden_state, without_added(fixed, images)) <= TOLERANCE
        assert model(images).logits.shape == (2, 3)


def test_other_precision():
    model = timm_model("vit_small_patch16_224")
    fixed, images = fix(model), random_images(64)
    with torch.no_grad(), vitreg.install_registers(model.to(torch.bfloat16), fixed):
        half = model.forward_features(images.bfloat16())
        assert half.dtype == torch.bfloat16
        assert error(half.float(), without_added(fixed, images)) < 0.05


def test_images_in_several_threads_do_not_meet():
    model = timm_model("vit_small_patch16_224", depth=4)
    fixed = fix(model)
    batches = [random_images(64, batch=1, seed=seed) for seed in range(16)]
    with vitreg.install_registers(model, fixed), ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(torch.no_grad()(model.forward_features), batches))
    with torch.no_grad():
        assert all(error(a, without_added(fixed, b)) <= TOLERANCE for a, b in zip(outputs, batches, strict=True))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_gradients_recomputed_or_not_are_those_of_the_fixed_model(library):
    if library == "timm":
        model = timm_model("vit_small_patch14_reg4_dinov2", img_size=56)
        recompute, out = lambda: model.set_grad_checkpointing(True), lambda images: model.forward_features(images)
    else:
        model = hf_model("Dinov2WithRegisters")
        recompute = lambda: model.gradient_checkpointing_enable()  # noqa: E731
        out = lambda images: model(images).last_hidden_state  # noqa: E731
    fixed, images = fix(model), random_images(56)
    without_added(fixed, images, 4).square().mean().backward()
    expected = fixed.patch_embed.weight.grad
    assert expected is not None
    weight = next(p for p in model.parameters() if p.shape == expected.shape)
    with vitreg.install_registers(model, fixed):
        for again in (False, True):
            model.train()
            if again:
                recompute()
            out(images).square().mean().backward()
            assert error(weight.grad, expected) <= 10 * TOLERANCE
            model.zero_grad()


def test_copies_keep_the_registers_and_share_nothing():
    model = timm_model("vit_small_patch16_224")
    fixed, images = fix(model), random_images(64)
    handle = vitreg.install_registers(model, fixed)
    with torch.no_grad():
        expected = model(images)
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(images), expected)
        handle.remove()
        assert torch.equal(twin(images), expected)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(images), expected)
    assert pickle.dumps(twin)


def test_hooks_of_others_see_what_they_saw():
    model = timm_model("vit_small_patch16_224")
    fixed, images = fix(model), random_images(64)
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
    with torch.no_grad(), vitreg.install_registers(model, fixed):
        model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        model(images)
    assert seen == [((2, 17, 96), (2, 17, 96)), (2, 17, 96)]


class TestRefusals:
    model = staticmethod(lambda: timm_model("vit_small_patch16_224"))

    def test_another_models_fix(self):
        model = self.model()
        other = fix(timm_model("vit_small_patch16_224", seed=1))
        with pytest.raises(ValueError, match=r"not made from this model: \d+ of \d+ weights differ, for example"):
            vitreg.install_registers(model, other)
        fixed = fix(model)
        with torch.no_grad():
            model.blocks[1].mlp.fc2.bias[3] += 1e-6
        with pytest.raises(ValueError, match=r"1 of \d+ weights differ, for example blocks.1.mlp.fc2.bias"):
            vitreg.install_registers(model, fixed)

    def test_another_architecture(self):
        fixed = fix(timm_model("vit_small_patch16_224", depth=3))
        with pytest.raises(ValueError, match="its depth 3 is 2 there"):
            vitreg.install_registers(self.model(), fixed)

    def test_nothing_to_install(self):
        model = self.model()
        with pytest.raises(ValueError, match="fixed has no registers, as many as the model itself"):
            vitreg.install_registers(model, vitreg.from_timm(model))

    def test_twice(self):
        model = self.model()
        fixed = fix(model)
        with (
            vitreg.install_registers(model, fixed),
            pytest.raises(ValueError, match=r"installed in this model already; remove\(\) them first"),
        ):
            vitreg.install_registers(model, fixed)

    def test_compiled(self):
        model = self.model()
        fixed = fix(model)
        with pytest.raises(ValueError, match="compiled; install registers first, then compile"):
            vitreg.install_registers(torch.compile(model), fixed)
        model.blocks[0].compile()
        with pytest.raises(ValueError, match=r"blocks\.0 is compiled"):
            vitreg.install_registers(model, fixed)

    def test_quantized(self):
        model = self.model()
        fixed = fix(model)
        model.head.weight = nn.Parameter(model.head.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"head is quantized or sharded"):
            vitreg.install_registers(model, fixed)

    def test_other_things(self):
        fixed = fix(self.model())
        with pytest.raises(ValueError, match="got a VisionTransformer and a VisionTransformer"):
            vitreg.install_registers(fixed, fixed)
        with pytest.raises(ValueError, match="no model that vitreg reads"):
            vitreg.install_registers(nn.Linear(2, 2), fixed)

    def test_tokens_that_lost_their_registers(self):
        model = self.model()
        fixed = fix(model)
        hook = model.blocks[0].register_forward_hook(lambda module, args, output: output.clone())
        with vitreg.install_registers(model, fixed):
            with pytest.raises(ValueError, match="block 1 got tokens without the registers that were installed"):
                model(random_images(64))
            hook.remove()
            model(random_images(64))


SCRIPT = textwrap.dedent(
    """
    import sys, timm, torch, vitreg

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(sys.argv[1], depth=2, embed_dim=96, num_heads=3, num_classes=5, dynamic_img_size=True)
    model = model.eval()
    fixed = vitreg.add_test_time_registers(model, neurons=[(0, 3), (1, 7)])
    images = torch.randn(2, 3, 4 * fixed.config.patch_size, 4 * fixed.config.patch_size)
    with torch.no_grad():
        before = model(images)
        handle = vitreg.install_registers(model, fixed)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), fixed.classify(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(images[:1]), fixed.classify(images[:1]), rtol=1e-4, atol=1e-5)
        handle.remove()
        torch.testing.assert_close(compiled(images), before, rtol=1e-4, atol=1e-5)
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit_small_patch16_224", "vit_small_patch16_dinov3_qkvb"])
def test_compiles_as_one_graph(architecture):
    run = subprocess.run([sys.executable, "-c", SCRIPT, architecture], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
