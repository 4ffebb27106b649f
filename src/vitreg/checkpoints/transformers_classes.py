"""The classes of transformers that vitreg reads: their families, and what their configs do not say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vitreg.checkpoints import transformers_rewrites as rewrites
from vitreg.checkpoints.weight_names import TRANSFORMERS, WeightNames
from vitreg.model import PositionInterpolation, Preprocess, RopeConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
EXACT = PositionInterpolation("bicubic", antialias=False)


@dataclass(frozen=True)
class Family:
    """What the classes of a family share and their configs do not say."""

    preprocess: Preprocess
    positions: PositionInterpolation = EXACT
    names: WeightNames = TRANSFORMERS
    rewrite: Callable[[Any, dict[str, Tensor]], None] | None = None  # of its weights
    rope: Callable[[Any], RopeConfig] | None = None  # of its config
    patch_padding: int = 0
    norm_eps: float | None = None  # where its config does not have it
    norm_twice: bool = False  # the last norm takes all tokens, and once more the pooled feature


@dataclass(frozen=True)
class Class:
    """A class of transformers: its family, and what its head reads, besides so many summary tokens."""

    family: Family
    pool: Literal["token", "mean", "token+mean", "attention"] = "token"
    num_summary_tokens: Callable[[Any], int] = lambda hf: 0  # of its config


def _powers(theta: float | int, num: int, count: int, first: int = 0) -> torch.Tensor:
    """`theta ** -(i / num)` for i = first, first + 2, ..., so many: RoPE's angles of one step."""
    exponents = torch.arange(first, first + 2 * count, 2, dtype=torch.float64, device="cpu") / num
    return 1 / theta**exponents


def dinov3_rope(theta: float, num: int) -> RopeConfig:
    """DINOv3's frequencies, from its config: the module's own table loses digits when cast to half."""
    return RopeConfig(tuple((2 * math.pi * _powers(theta, 2 * num, num)).tolist()))


def _head_dim(hf: Any) -> int:
    return hf.hidden_size // hf.num_attention_heads


def _dinov3_rope(hf: Any) -> RopeConfig:
    return dinov3_rope(hf.rope_theta, _head_dim(hf) // 4)


def _pixtral_rope(hf: Any) -> RopeConfig:
    """Rows turn by the even frequencies, columns by the odd ones."""
    dim, theta = _head_dim(hf), hf.rope_parameters["rope_theta"]
    rows, columns = (_powers(theta, dim // 2, dim // 4, first) for first in (0, 1))
    return RopeConfig(tuple(rows.tolist()), "index", column_frequencies=tuple(columns.tolist()))


def _llama4_rope(hf: Any) -> RopeConfig:
    """Columns before rows, both counted from 1."""
    half = _head_dim(hf) // 2
    frequencies = _powers(hf.rope_parameters["rope_theta"], half, half // 2)
    return RopeConfig(tuple(frequencies.tolist()), "index", offset=1.0, interleaved=True, swap_axes=True)


_SQUASHED = Preprocess(interpolation="bilinear", crop="squash", crop_pct=1.0)
_VIT = Family(replace(_SQUASHED, mean=HALF, std=HALF))
_MAE = _MSN = _IJEPA = Family(_SQUASHED)
_DINOV3 = Family(_SQUASHED, rope=_dinov3_rope)
_DINOV2 = Family(Preprocess(crop_pct=224 / 256))
_DINOV2_REG = replace(_DINOV2, positions=PositionInterpolation("bicubic", antialias=True))
_TIPS = Family(
    Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", crop="squash", crop_pct=1.0),
    positions=PositionInterpolation("bilinear", antialias=True),
)
_CLIP = Family(Preprocess(mean=CLIP_MEAN, std=CLIP_STD, crop_pct=1.0), names=TRANSFORMERS.norm_after_pool())
_CLIP_UNNORMED = replace(_CLIP, names=replace(TRANSFORMERS, unused=rf"{TRANSFORMERS.unused}|(^|\.)post_layernorm\."))
_CLIPSEG = replace(_CLIP, preprocess=_SQUASHED)
_GIT = Family(_CLIP.preprocess)
_BLIP = Family(replace(_CLIP.preprocess, crop="squash"), norm_twice=True)
_FLAVA = replace(_BLIP, norm_twice=False)
_OWL = replace(_CLIP, preprocess=_BLIP.preprocess)
_SIGLIP = Family(replace(_VIT.preprocess, interpolation="bicubic"))
_IDEFICS = replace(_VIT, positions=PositionInterpolation("bucket", antialias=False))
_DPT = Family(_SIGLIP.preprocess, positions=PositionInterpolation("bilinear", antialias=False))
_SIGLIP2 = replace(_VIT, positions=PositionInterpolation("bilinear", antialias=True))
_BEIT = Family(
    replace(_SIGLIP.preprocess, interpolation="bicubic"),
    positions=PositionInterpolation("bilinear", antialias=False),  # of the table of offsets
    rewrite=rewrites.beit,
)
_PHI4 = replace(_SIGLIP, positions=_IDEFICS.positions)
_DEIT = Family(Preprocess(crop_pct=224 / 256))
_INTERNVL = Family(replace(_SQUASHED, interpolation="bicubic"), rewrite=rewrites.internvl)
_PIXIO = replace(_INTERNVL, rewrite=rewrites.class_tokens)
_YOLOS = Family(_SQUASHED, rewrite=rewrites.yolos)
_VITPOSE = Family(_SQUASHED, rewrite=rewrites.vitpose, patch_padding=2)
_RADIO = Family(
    replace(_SQUASHED, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bicubic"),  # the model has its own
    positions=PositionInterpolation("bilinear", antialias=False, square=True),
    rewrite=rewrites.radio,
)
_AIMV2 = Family(_CLIP.preprocess, positions=PositionInterpolation("sincos", antialias=False), rewrite=rewrites.aimv2)
_PIXTRAL = Family(_BLIP.preprocess, rope=_pixtral_rope, norm_eps=1e-5)
_LLAMA4 = Family(_VIT.preprocess, rewrite=rewrites.llama4, rope=_llama4_rope, norm_eps=1e-5)

CLASSES = {
    "ViTModel": Class(_VIT),
    "ViTForImageClassification": Class(_VIT),
    "ViTMAEModel": Class(_MAE),
    "ViTMAEForPreTraining": Class(_MAE),
    "ViTMSNModel": Class(_MSN),
    "ViTMSNForImageClassification": Class(_MSN),
    "IJepaModel": Class(_IJEPA, "mean"),
    "IJepaForImageClassification": Class(_IJEPA, "mean"),
    "Dinov2Model": Class(_DINOV2),
    "Dinov2Backbone": Class(_DINOV2),
    "Dinov2ForImageClassification": Class(_DINOV2, "token+mean"),
    "Dinov2WithRegistersModel": Class(_DINOV2_REG),
    "Dinov2WithRegistersBackbone": Class(_DINOV2_REG),
    "Dinov2WithRegistersForImageClassification": Class(_DINOV2_REG, "token+mean"),
    "Tipsv2VisionModel": Class(_TIPS),
    "DINOv3ViTModel": Class(_DINOV3),
    "DINOv3ViTBackbone": Class(_DINOV3),
    "CLIPModel": Class(_CLIP),
    "CLIPVisionModel": Class(_CLIP),
    "CLIPVisionModelWithProjection": Class(_CLIP),
    "CLIPForImageClassification": Class(_CLIP_UNNORMED, "mean"),
    "MetaClip2Model": Class(_CLIP),
    "MetaClip2VisionModel": Class(_CLIP),
    "MetaClip2VisionModelWithProjection": Class(_CLIP),
    "MetaClip2ForImageClassification": Class(_CLIP_UNNORMED, "mean"),
    "ChineseCLIPModel": Class(_CLIP),
    "ChineseCLIPVisionModel": Class(_CLIP),
    "AltCLIPModel": Class(_CLIP),
    "AltCLIPVisionModel": Class(_CLIP),
    "Kosmos2VisionTransformer": Class(_CLIP),
    "CLIPSegModel": Class(_CLIPSEG),
    "CLIPSegVisionModel": Class(_CLIPSEG),
    "OwlViTModel": Class(_OWL),
    "OwlViTVisionModel": Class(_OWL),
    "Owlv2Model": Class(_OWL),
    "Owlv2VisionModel": Class(_OWL),
    "GitVisionModel": Class(_GIT),
    "BlipModel": Class(_BLIP),
    "BlipVisionModel": Class(_BLIP),
    "Blip2VisionModel": Class(_BLIP),
    "InstructBlipVisionModel": Class(_BLIP),
    "InstructBlipVideoVisionModel": Class(_BLIP),
    "FlavaImageModel": Class(_FLAVA),
    "SiglipModel": Class(_SIGLIP, "attention"),
    "SiglipVisionModel": Class(_SIGLIP, "attention"),
    "SiglipForImageClassification": Class(_SIGLIP, "mean"),
    "Siglip2Model": Class(_SIGLIP2, "attention"),
    "Siglip2VisionModel": Class(_SIGLIP2, "attention"),
    "Siglip2ForImageClassification": Class(_SIGLIP2, "mean"),
    "Idefics2VisionTransformer": Class(_IDEFICS, "mean"),
    "Idefics3VisionTransformer": Class(_IDEFICS, "mean"),
    "SmolVLMVisionTransformer": Class(_IDEFICS, "mean"),
    "JanusVisionModel": Class(_SIGLIP, "mean"),
    "DPTModel": Class(_DPT),
    "BeitModel": Class(_BEIT, "mean"),
    "BeitForImageClassification": Class(_BEIT, "mean"),
    "Data2VecVisionModel": Class(_BEIT, "mean"),
    "Data2VecVisionForImageClassification": Class(_BEIT, "mean"),
    "DeiTModel": Class(_DEIT, num_summary_tokens=lambda hf: 1),
    "DeiTForImageClassification": Class(_DEIT),
    "DeiTForImageClassificationWithTeacher": Class(_DEIT, num_summary_tokens=lambda hf: 1),
    "InternVLVisionModel": Class(_INTERNVL),
    "QianfanOCRVisionModel": Class(_INTERNVL),
    "Phi4MultimodalVisionModel": Class(_PHI4, "attention"),
    "PixtralVisionModel": Class(_PIXTRAL, "mean"),
    "Llama4VisionModel": Class(_LLAMA4),
    "Aimv2Model": Class(_AIMV2, "attention"),
    "Aimv2VisionModel": Class(_AIMV2, "attention"),
    "RadioModel": Class(_RADIO, num_summary_tokens=lambda hf: len(hf.summary_idxs) - 1),
    "PixioModel": Class(_PIXIO, num_summary_tokens=lambda hf: hf.n_cls_tokens - 1),
    "YolosModel": Class(_YOLOS),
    "VitPoseBackbone": Class(_VITPOSE, "mean"),
    "Tipsv2VisionBackbone": Class(_TIPS),
}
