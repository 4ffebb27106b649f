"""Tiny random models under the names of released ones, and fixes of them, for the code of docs/pipelines.md."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers

import vitreg

SIDES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {**SIDES, "intermediate_size": 48, "image_size": 56, "patch_size": 14}


def write_models(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put models and fixes into the folder that the code runs in; timm and open_clip build tiny ones.

    Repositories are folders there, which transformers prefers to the hub.
    """
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIDES, intermediate_size=48, vocab_size=64)
    vision = transformers.CLIPVisionConfig(**TOWER, projection_dim=24)
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    )
    llava.save_pretrained(folder / "llava-hf/llava-1.5-7b-hf")
    fix(llava, folder / "clip-l-fixed.safetensors")

    dinov2 = transformers.Dinov2Model(transformers.Dinov2Config(**SIDES, mlp_ratio=2, image_size=56, patch_size=14))
    dinov2.save_pretrained(folder / "facebook/dinov2-base")
    transformers.BitImageProcessor(size={"shortest_edge": 56}, crop_size=56).save_pretrained(
        folder / "facebook/dinov2-base"
    )
    fix(dinov2, folder / "dinov2-fixed.safetensors")

    vision = {"layers": 2, "width": 96, "head_width": 32, "patch_size": 16, "image_size": 224}
    clip = open_clip.CLIP(24, vision, {"width": 32, "heads": 2, "layers": 1}, quick_gelu=True)
    transform = open_clip.image_transform(224, is_train=False)
    patch.setattr(open_clip, "create_model_and_transforms", lambda *args, **kwargs: (clip, None, transform))
    fix(clip, folder / "clip-b16-fixed.safetensors")

    create_model = timm.create_model
    vitreg.save(vitreg.from_open_clip(clip), folder / "clip-b16.safetensors", format="timm")

    def create(name: str, *, pretrained: bool = False, **options: object) -> torch.nn.Module:
        """The same tower under timm's name, as timm's weights of OpenAI are."""
        if not pretrained:
            return create_model(name, **options)
        model = create_model(name, depth=2, embed_dim=96, num_heads=3, **options)
        weights = timm.models.load_state_dict(str(folder / "clip-b16.safetensors"))
        model.load_state_dict({key: value for key, value in weights.items() if "head" not in key}, strict=False)
        return model

    patch.setattr(timm, "create_model", create)
    tiny = vitreg.load("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    vitreg.save(vitreg.add_test_time_registers(tiny, neurons=[(7, 417)]), folder / "fixed.safetensors")


def fix(model: torch.nn.Module, path: Path) -> None:
    vitreg.save(vitreg.add_test_time_registers(model, neurons=[(0, 1), (1, 7)]), path)
