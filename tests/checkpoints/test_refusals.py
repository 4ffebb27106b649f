"""What is unlike the models that are read is refused in a sentence; `test_coverage.py` asks every model as it is.

On the device "meta": what is refused is decided by modules and shapes alone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from vitreg import CheckpointError, from_state_dict, from_timm, from_transformers

pytestmark = pytest.mark.filterwarnings("ignore")


def outcome(convert: Callable[[], Any]) -> str | None:
    """None where it converts, the sentence where it is refused; whatever else is raised is the test's to see."""
    try:
        convert()
    except CheckpointError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) > 20, sentence
        return sentence
    return None


def failures(models: dict[str, Callable[[], Any]], convert: Callable[[Any], Any]) -> list[str]:
    """Whatever happens besides conversions and refusals."""
    found = []
    for name, build in models.items():
        model = build()
        if model is None:
            continue
        try:
            outcome(lambda model=model: convert(model))
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    ["vit_base_r50_s16_224", "resnet50", "hiera_tiny_224", "convit_tiny"],
)
def test_a_state_dict_of_an_architecture_that_is_no_plain_vit_is_refused(architecture):
    with torch.device("meta"):
        state = timm.create_model(architecture).state_dict()
    assert outcome(lambda: from_state_dict(state, architecture))


def test_damaged_tensors_of_a_state_dict_are_refused():
    """Heads without a second axis, positions without tokens, and so on: IndexError and ZeroDivisionError before."""
    failures = []
    for architecture in ("vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"):
        with torch.device("meta"):
            state = timm.create_model(architecture, depth=1).state_dict()
        for key in ("head.weight", "pos_embed", "patch_embed.proj.weight", "cls_token", "norm.weight"):
            for shape in ((), (0,), (3,), (2, 2), (1, 2, 3), (1, 0, 3), (1, 2, 3, 4)):
                damaged = {**state, key: torch.zeros(shape)}
                try:
                    assert outcome(
                        lambda a=architecture, s=damaged: from_state_dict(s, a, model_kwargs={"depth": 1})
                    ), (architecture, key, shape)
                except Exception as error:
                    failures.append(f"{architecture} {key} {shape}: {error!r}")
    assert not failures, failures


def with_adapter() -> nn.Module:
    """A linear layer that shows the weight it adapts, as peft's LoRA does, without what it adds."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.weight, self.bias = base.weight, base.bias

    model: Any = timm.create_model("vit_tiny_patch16_224", depth=1)
    model.blocks[0].attn.qkv = Adapted(model.blocks[0].attn.qkv)
    return model


def test_adapters_in_the_attention_are_not_dropped_in_silence():
    with pytest.raises(CheckpointError, match=r"a Adapted in its attention .merge adapters first"):
        from_timm(with_adapter())


def test_a_module_that_was_rebuilt_by_hand_is_refused_in_a_sentence():
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=1)
    del model.blocks[0].attn.num_heads
    with pytest.raises(CheckpointError, match=r"has a part that vitreg does not know .*num_heads"):
        from_timm(model)


# --- transformers ---------------------------------------------------------------------------------

TINY = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=56, patch_size=14
)


def tiny(config: Any, **options: Any) -> Any:
    """The same with small numbers wherever it has such."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        for key, value in (TINY | options).items() if part is not None else ():
            if hasattr(part, key) and not isinstance(getattr(part, key), list | tuple):
                setattr(part, key, value)
    return config


def hf_model(kind: Any, **options: Any) -> nn.Module | None:
    """None where transformers itself cannot build it."""
    try:
        with torch.device("meta"):
            return kind(tiny(kind.config_class(), **options))
    except Exception:
        return None


def hf_classes(module: str) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    try:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    except ImportError:
        return {}  # another version of transformers
    return {
        name: kind
        for name, kind in inspect.getmembers(found, inspect.isclass)
        if issubclass(kind, transformers.PreTrainedModel)
        and kind.__module__ == found.__name__
        and kind.config_class is not None
        and not name.endswith("PreTrainedModel")
    }


OPTIONS = [
    {"image_size": 50}, {"image_size": (56, 84)}, {"image_size": 7}, {"patch_size": (14, 7)}, {"num_channels": 1},
    {"hidden_act": "relu"}, {"qkv_bias": False}, {"num_labels": 0}, {"use_swiglu_ffn": True}, {"use_gated_mlp": True},
    {"num_register_tokens": 0}, {"key_bias": True}, {"vision_use_head": False}, {"apply_layernorm": False},
    {"use_mask_token": False}, {"num_patches": 15}, {"layer_norm_eps": 0.0}, {"drop_path_rate": 0.5},
    {"num_attention_heads": 1}, {"intermediate_size": 1}, {"num_hidden_layers": 0},
]  # fmt: skip


UNUSUAL = (
    "vit", "vit_mae", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "siglip", "siglip2", "ijepa", "dpt",
    "flava", "idefics3",
)  # fmt: skip


@pytest.mark.parametrize("module", UNUSUAL)
def test_unusual_settings_of_transformers_convert_or_are_refused_in_a_sentence(module):
    models = {
        f"{name} {options}": lambda kind=kind, options=options: hf_model(kind, **options)
        for name, kind in hf_classes(module).items()
        for options in OPTIONS
    }
    found = failures(models, from_transformers)
    assert not found, found


def test_a_model_with_two_vision_transformers_asks_which():
    model = hf_model(pytest.importorskip("transformers").VideoLlavaModel)
    with pytest.raises(CheckpointError, match=r"video_tower \(CLIPVisionModel\), image_tower .*give one of them"):
        from_transformers(model)
    assert from_transformers(model.image_tower).config.pool == "token"


def test_a_table_of_positions_that_is_no_square_is_refused():
    transformers = pytest.importorskip("transformers")
    model = hf_model(transformers.Siglip2VisionModel, num_patches=15)
    with pytest.raises(CheckpointError, match="a table of 15 positions, no square"):
        from_transformers(model)
