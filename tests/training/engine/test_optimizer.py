"""Parameter groups, LAMB and schedules against timm's and PyTorch's."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler

from peers import perturb
from training.distillation_steps import small_method as small_distillation
from training.small import small_config
from vitreg.model import VisionTransformer
from vitreg.training.engine.config import OptimizerConfig
from vitreg.training.engine.optimizer import build_optimizer, learning_rate, parameter_groups, set_schedules

MODEL = dataclasses.replace(small_config().model, depth=3)


def by_name(module: torch.nn.Module, config: OptimizerConfig) -> dict[str, dict]:
    """The group of every parameter."""
    return {name: group for group in parameter_groups(module, config) for name in group["names"]}


def test_timm_issue_2712_registers_decayed_at_the_last_layers_rate():
    """timm until 1.0.28 decayed reg_token and gave it the learning rate of the head."""
    groups = by_name(VisionTransformer(MODEL), OptimizerConfig(layer_decay=0.7))
    assert not groups["registers"]["decays"]
    assert groups["registers"]["lr_scale"] == groups["patch_embed.weight"]["lr_scale"] == pytest.approx(0.7**4)


def test_only_matrices_decay():
    groups = by_name(VisionTransformer(MODEL), OptimizerConfig())
    decayed = {name for name, group in groups.items() if group["decays"]}
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in matrices}
    assert decayed == expected | {"patch_embed.weight", "head.weight"}
    others = {"registers", "cls_token", "pos_embed", "norm.weight", "patch_embed.bias", "blocks.0.ls1", "head.bias"}
    assert others <= set(groups) - decayed
    optimizer = build_optimizer(VisionTransformer(MODEL), OptimizerConfig(weight_decay=0.3, final_weight_decay=0.5))
    for step, decay in ((0, 0.3), (5, 0.4), (10, 0.5)):
        set_schedules(optimizer, OptimizerConfig(weight_decay=0.3, final_weight_decay=0.5), step, 10)
        for group in optimizer.param_groups:
            assert group["weight_decay"] == pytest.approx(decay if group["decays"] else 0.0)


def test_self_distillation_decays_no_mask_token_and_trains_no_teacher():
    method = small_distillation()
    groups = by_name(method, OptimizerConfig())
    assert not groups["mask_token"]["decays"]
    assert not groups["vit.registers"]["decays"]
    assert groups["vit.blocks.0.mlp.fc1.weight"]["decays"]
    assert set(groups) == {name for name, p in method.named_parameters() if p.requires_grad}
    assert not any("teacher" in name for name in groups)


def test_frozen_parameters_are_left_out():
    vit = VisionTransformer(MODEL)
    vit.patch_embed.requires_grad_(False)
    groups = by_name(vit, OptimizerConfig())
    assert "patch_embed.weight" not in groups
    assert len(groups) == len(list(vit.parameters())) - 2


def test_layer_decay_is_timms():
    options = {"depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 4, "img_size": 32, "init_values": 1e-5}
    peer = timm.create_model("vit_base_patch16_224", **options)
    theirs = {
        name: (group["lr_scale"], group["weight_decay"] > 0)
        for group in param_groups_layer_decay(
            peer, weight_decay=0.1, layer_decay=0.6, no_weight_decay_list=peer.no_weight_decay()
        )
        for name in names_of(peer, group["params"])
    }
    vit = VisionTransformer(dataclasses.replace(MODEL, num_registers=0))
    ours = {
        name: (group["lr_scale"], group["decays"])
        for name, group in by_name(vit, OptimizerConfig(layer_decay=0.6)).items()
    }
    renamed = {
        "pos_embed": "pos_embed",
        "patch_embed.proj": "patch_embed",
        "ls1.gamma": "ls1",
        "ls2.gamma": "ls2",
    }
    for name, (scale, decays) in theirs.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        # timm counts the last norm to the last block; BEiT and MAE, as we, to the head.
        expected = 1.0 if name.startswith("norm.") else scale
        assert ours.pop(name) == (pytest.approx(expected), decays), name
    assert not ours


def names_of(model: torch.nn.Module, parameters: list) -> list[str]:
    wanted = {id(p) for p in parameters}
    return [name for name, p in model.named_parameters() if id(p) in wanted]


def test_lamb_adapts_matrices_only():
    """Where timm's LAMB has a trust ratio, twice the weights move twice as far; elsewhere as far as before."""
    moved = []
    for scale in (1.0, 2.0):
        vit = perturb(VisionTransformer(MODEL))
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.mul_(scale)
        before = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}
        optimizer = build_optimizer(vit, OptimizerConfig(name="lamb", lr=1e-3, weight_decay=1e-9))
        set_schedules(optimizer, OptimizerConfig(name="lamb", lr=1e-3, weight_decay=1e-9), 0, 10)
        generator = torch.Generator().manual_seed(0)
        for parameter in vit.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        moved.append({name: float((p.detach() - before[name]).norm()) for name, p in vit.named_parameters()})
    groups = by_name(vit, OptimizerConfig())
    for name, distance in moved[0].items():
        assert moved[1][name] == pytest.approx(distance * (2 if groups[name]["decays"] else 1), rel=1e-3), name
    assert moved[0]["registers"] > 0


@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_timms_cosine(warmup):
    config = OptimizerConfig(lr=3e-3, final_lr=1e-5, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    peer = CosineLRScheduler(
        optimizer,
        t_initial=40 - warmup,
        lr_min=1e-5,
        warmup_t=warmup,
        warmup_lr_init=1e-6,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(40):
        peer.step_update(step)
        assert learning_rate(config, step, 40) == pytest.approx(optimizer.param_groups[0]["lr"]), step


def test_schedules_are_multiplied_by_the_layers_factor():
    config = OptimizerConfig(lr=1e-2, warmup_steps=4, layer_decay=0.5)
    optimizer = build_optimizer(VisionTransformer(MODEL), config)
    rate = set_schedules(optimizer, config, 2, 20)
    assert rate == pytest.approx(1e-6 + (1e-2 - 1e-6) / 2)
    rates = sorted({group["lr"] for group in optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([rate * 0.5**i for i in range(5)])
