"""Weights under the names of transformers 4 and of transformers 5."""

import pytest
import torch

from checkpoints.transformers_models import dinov2_config, hf, images, perturb, same_tokens
from vitreg.checkpoints.from_transformers import from_transformers
from vitreg.checkpoints.weight_names import TRANSFORMERS


# Parameters as transformers 4.5x named them (`model.safetensors` of google/vit-base-patch16-224,
# facebook/dinov2-base, facebook/dinov2-giant, facebook/dinov3-vits16-pretrain-lvd1689m,
# openai/clip-vit-base-patch32, google/siglip-base-patch16-224), beside those of transformers 5 and ours.
@pytest.mark.parametrize(
    ("transformers4", "transformers5", "ours"),
    [
        (
            "vit.encoder.layer.0.attention.attention.query.weight",
            "vit.layers.0.attention.q_proj.weight",
            "blocks.0.attn.q.weight",
        ),
        (
            "vit.encoder.layer.11.attention.attention.value.bias",
            "vit.layers.11.attention.v_proj.bias",
            "blocks.11.attn.v.bias",
        ),
        (
            "vit.encoder.layer.0.attention.output.dense.weight",
            "vit.layers.0.attention.o_proj.weight",
            "blocks.0.attn.proj.weight",
        ),
        ("vit.encoder.layer.0.intermediate.dense.bias", "vit.layers.0.mlp.fc1.bias", "blocks.0.mlp.fc1.bias"),
        ("vit.encoder.layer.0.output.dense.weight", "vit.layers.0.mlp.fc2.weight", "blocks.0.mlp.fc2.weight"),
        (
            "vit.encoder.layer.0.layernorm_before.bias",
            "vit.layers.0.layernorm_before.bias",
            "blocks.0.norm1.bias",
        ),
        (
            "vit.encoder.layer.0.layernorm_after.bias",
            "vit.layers.0.layernorm_after.bias",
            "blocks.0.norm2.bias",
        ),
        ("vit.layernorm.weight", "layernorm.weight", "norm.weight"),
        ("vit.embeddings.patch_embeddings.projection.weight",) * 2 + ("patch_embed.weight",),
        ("vit.embeddings.position_embeddings", "embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.cls_token", "embeddings.cls_token", "cls_token"),
        ("classifier.weight", "classifier.weight", "head.weight"),
        (
            "encoder.layer.3.attention.attention.key.weight",
            "encoder.layer.3.attention.k_proj.weight",
            "blocks.3.attn.k.weight",
        ),
        (
            "encoder.layer.3.attention.output.dense.bias",
            "encoder.layer.3.attention.o_proj.bias",
            "blocks.3.attn.proj.bias",
        ),
        (
            "dinov2.encoder.layer.3.layer_scale1.lambda1",
            "encoder.layer.3.layer_scale1.lambda1",
            "blocks.3.ls1",
        ),
        (
            "encoder.layer.3.mlp.weights_out.bias",
            "encoder.layer.3.mlp.down_proj.bias",
            "blocks.3.mlp.fc2.bias",
        ),
        ("embeddings.register_tokens", "dinov2_with_registers.embeddings.register_tokens", "registers"),
        (
            "layer.2.attention.q_proj.weight",
            "model.layer.2.attention.q_proj.weight",
            "blocks.2.attn.q.weight",
        ),
        ("layer.2.mlp.down_proj.bias", "model.layer.2.mlp.down_proj.bias", "blocks.2.mlp.fc2.bias"),
        ("embeddings.patch_embeddings.weight", "embeddings.patch_embeddings.weight", "patch_embed.weight"),
        ("norm.weight", "norm.weight", "norm.weight"),
        (
            "vision_model.encoder.layers.1.self_attn.out_proj.bias",
            "encoder.layers.1.self_attn.out_proj.bias",
            "blocks.1.attn.proj.bias",
        ),
        (
            "vision_model.encoder.layers.1.layer_norm2.bias",
            "encoder.layers.1.layer_norm2.bias",
            "blocks.1.norm2.bias",
        ),
        ("vision_model.embeddings.class_embedding", "embeddings.class_embedding", "cls_token"),
        (
            "vision_model.embeddings.position_embedding.weight",
            "embeddings.position_embedding.weight",
            "pos_embed",
        ),
        (
            "vision_model.embeddings.patch_embedding.bias",
            "embeddings.patch_embedding.bias",
            "patch_embed.bias",
        ),
        ("vision_model.pre_layrnorm.weight", "pre_layrnorm.weight", "norm_pre.weight"),
        ("vision_model.post_layernorm.weight", "post_layernorm.weight", "norm.weight"),
        ("visual_projection.weight", "visual_projection.weight", "head.weight"),
        ("vision_model.head.probe", "head.probe", "attention_pool.latent"),
        (
            "vision_model.head.attention.in_proj_bias",
            "head.attention.in_proj_bias",
            "attention_pool.in_proj.bias",
        ),
        (
            "vision_model.head.attention.out_proj.bias",
            "head.attention.out_proj.bias",
            "attention_pool.proj.bias",
        ),
        ("vision_model.head.layernorm.bias", "head.layernorm.bias", "attention_pool.norm.bias"),
        ("vision_model.head.mlp.fc1.bias", "head.mlp.fc1.bias", "attention_pool.mlp.fc1.bias"),
        ("encoder.layer.3.mlp.weights_in.weight", None, "blocks.3.mlp.fc1.weight"),
        ("vision_model.embeddings.position_ids", "embeddings.position_ids", None),
        ("text_model.encoder.layers.1.self_attn.out_proj.bias", "text_projection.weight", None),
        ("embeddings.mask_token", "dinov2.embeddings.mask_token", None),
        ("pooler.dense.weight", "logit_scale", None),
    ],
)
def test_names_of_both_generations(transformers4, transformers5, ours):
    assert TRANSFORMERS.ours(transformers4) == ours
    assert transformers5 is None or TRANSFORMERS.ours(transformers5) == ours


@torch.no_grad()
def test_dinov2_swiglu_of_transformers_4_is_gate_first():
    """Version 4 held gate and value in one matrix: `x1, x2 = weights_in(x).chunk(2); silu(x1) * x2`."""
    theirs = perturb(hf.Dinov2Model(dinov2_config(False, use_swiglu_ffn=True)))
    state = theirs.state_dict()
    for key in [key for key in state if ".mlp.gate_proj." in key]:
        gate, up = state.pop(key), state.pop(key.replace("gate_proj", "up_proj"))
        state[key.replace("gate_proj", "weights_in")] = torch.cat((gate, up))
    state = {key.replace("down_proj", "weights_out"): tensor for key, tensor in state.items()}
    old = hf.Dinov2Model(theirs.config)
    old.state_dict = lambda: state
    x = images(56, 56)
    same_tokens(from_transformers(old), x, theirs(x).last_hidden_state)
