"""Checkpoints by the names that people use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from vitreg.model import PositionInterpolation

MODULES = ("vision_transformer", "eva", "deit", "beit", "vision_transformer_relpos", "naflexvit")
"""Modules of timm with the classes that vitreg reads."""

OFFICIAL_POSITIONS = PositionInterpolation("bicubic", antialias=False, offset=0.1)
"""The rule of DINO and the first DINOv2; see `Model.interpolation`."""


@dataclass(frozen=True)
class Model:
    """One released checkpoint.

    Attributes:
        name: short name, that of the official hub where there is one.
        timm: timm's architecture and tag, from which the weights come; empty for those that vitreg brings along.
        million_parameters: of the whole model, its head included.
        patch_size: in pixels.
        num_registers: trained ones; timm counts RADIO's summary tokens among them.
        licence: of the weights, as on the model card.
    """

    name: str
    timm: str
    million_parameters: float
    patch_size: int
    num_registers: int
    licence: str

    @property
    def interpolation(self) -> PositionInterpolation | None:
        """The official repository's position rule where it is not timm's (None: timm's).

        DINO and the first DINOv2 resize by a scale factor with offset and without antialiasing: dino's
        `vision_transformer.py`, dinov2's `hub/backbones.py` (`interpolate_offset=0.1`, `interpolate_antialias=False`;
        with registers 0.0 and True, which is timm's rule too).
        """
        first_dinov2 = self.name.startswith("dinov2_") and not self.name.endswith("_reg")
        return OFFICIAL_POSITIONS if self.name.startswith("dino_") or first_dinov2 else None

    @property
    def bundled(self) -> Path | None:
        """The file that the package brings along, where there is one; its model card lies beside it."""
        return None if self.timm else Path(__file__).parent / "bundled" / f"{self.name}.safetensors"


def official_options(architecture: str) -> dict[str, Any]:
    """What timm must be told to build an architecture as its authors use it.

    DINOv3 reads its class token (`dinov3/models/vision_transformer.py`), timm by default the mean of its patches.
    """
    return {"global_pool": "token"} if "dinov3" in architecture else {}


MODELS = (
    Model("vitreg_tiny", "", 3.3, 16, 0, "apache-2.0"),
    Model("vitreg_tiny_reg4", "", 3.3, 16, 4, "apache-2.0"),
    Model("dino_vits16", "vit_small_patch16_224.dino", 21.7, 16, 0, "apache-2.0"),
    Model("dino_vits8", "vit_small_patch8_224.dino", 21.7, 8, 0, "apache-2.0"),
    Model("dino_vitb16", "vit_base_patch16_224.dino", 85.8, 16, 0, "apache-2.0"),
    Model("dino_vitb8", "vit_base_patch8_224.dino", 85.8, 8, 0, "apache-2.0"),
    Model("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", 22.1, 14, 0, "apache-2.0"),
    Model("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 22.1, 14, 4, "apache-2.0"),
    Model("dinov2_vitb14", "vit_base_patch14_dinov2.lvd142m", 86.6, 14, 0, "apache-2.0"),
    Model("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2.lvd142m", 86.6, 14, 4, "apache-2.0"),
    Model("dinov2_vitl14", "vit_large_patch14_dinov2.lvd142m", 304.4, 14, 0, "apache-2.0"),
    Model("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2.lvd142m", 304.4, 14, 4, "apache-2.0"),
    Model("dinov2_vitg14", "vit_giant_patch14_dinov2.lvd142m", 1136.5, 14, 0, "apache-2.0"),
    Model("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m", 1136.5, 14, 4, "apache-2.0"),
    Model("dinov3_vits16", "vit_small_patch16_dinov3_qkvb.lvd1689m", 21.6, 16, 4, "dinov3-license"),
    Model("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb.lvd1689m", 28.7, 16, 4, "dinov3-license"),
    Model("dinov3_vitb16", "vit_base_patch16_dinov3_qkvb.lvd1689m", 85.7, 16, 4, "dinov3-license"),
    Model("dinov3_vitl16", "vit_large_patch16_dinov3_qkvb.lvd1689m", 303.1, 16, 4, "dinov3-license"),
    Model("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3_qkvb.lvd1689m", 840.6, 16, 4, "dinov3-license"),
    Model("dinov3_vit7b16", "vit_7b_patch16_dinov3.lvd1689m", 6716.0, 16, 4, "dinov3-license"),
    Model("deit3_small_patch16_224", "deit3_small_patch16_224.fb_in1k", 22.1, 16, 0, "apache-2.0"),
    Model("deit3_base_patch16_224", "deit3_base_patch16_224.fb_in1k", 86.6, 16, 0, "apache-2.0"),
    Model("deit3_large_patch16_224", "deit3_large_patch16_224.fb_in1k", 304.4, 16, 0, "apache-2.0"),
    Model("deit3_huge_patch14_224", "deit3_huge_patch14_224.fb_in1k", 632.1, 14, 0, "apache-2.0"),
    Model("deit_tiny_patch16_224", "deit_tiny_patch16_224.fb_in1k", 5.7, 16, 0, "apache-2.0"),
    Model("deit_small_patch16_224", "deit_small_patch16_224.fb_in1k", 22.1, 16, 0, "apache-2.0"),
    Model("deit_base_patch16_224", "deit_base_patch16_224.fb_in1k", 86.6, 16, 0, "apache-2.0"),
    Model("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224.fb_in1k", 5.9, 16, 0, "apache-2.0"),
    Model("deit_small_distilled_patch16_224", "deit_small_distilled_patch16_224.fb_in1k", 22.4, 16, 0, "apache-2.0"),
    Model("deit_base_distilled_patch16_224", "deit_base_distilled_patch16_224.fb_in1k", 87.3, 16, 0, "apache-2.0"),
    Model("augreg_vit_ti16", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", 5.7, 16, 0, "apache-2.0"),
    Model("augreg_vit_s16", "vit_small_patch16_224.augreg_in21k_ft_in1k", 22.1, 16, 0, "apache-2.0"),
    Model("augreg_vit_b16", "vit_base_patch16_224.augreg_in21k_ft_in1k", 86.6, 16, 0, "apache-2.0"),
    Model("augreg_vit_l16", "vit_large_patch16_224.augreg_in21k_ft_in1k", 304.3, 16, 0, "apache-2.0"),
    Model("mae_vitb16", "vit_base_patch16_224.mae", 85.8, 16, 0, "cc-by-nc-4.0"),
    Model("mae_vitl16", "vit_large_patch16_224.mae", 303.3, 16, 0, "cc-by-nc-4.0"),
    Model("mae_vith14", "vit_huge_patch14_224.mae", 630.8, 14, 0, "cc-by-nc-4.0"),
    Model("clip_vit_b32", "vit_base_patch32_clip_quickgelu_224.openai", 87.8, 32, 0, "apache-2.0"),
    Model("clip_vit_b16", "vit_base_patch16_clip_quickgelu_224.openai", 86.2, 16, 0, "apache-2.0"),
    Model("clip_vit_l14", "vit_large_patch14_clip_quickgelu_224.openai", 304.0, 14, 0, "apache-2.0"),
    Model("clip_vit_l14_336", "vit_large_patch14_clip_quickgelu_336.openai", 304.3, 14, 0, "apache-2.0"),
    Model("openclip_vit_b32", "vit_base_patch32_clip_224.laion2b", 87.8, 32, 0, "apache-2.0"),
    Model("openclip_vit_b16", "vit_base_patch16_clip_224.laion2b", 86.2, 16, 0, "apache-2.0"),
    Model("openclip_vit_l14", "vit_large_patch14_clip_224.laion2b", 304.0, 14, 0, "apache-2.0"),
    Model("openclip_vit_h14", "vit_huge_patch14_clip_224.laion2b", 632.1, 14, 0, "apache-2.0"),
    Model("openclip_vit_g14", "vit_giant_patch14_clip_224.laion2b", 1012.6, 14, 0, "apache-2.0"),
    Model("openclip_vit_bigg14", "vit_gigantic_patch14_clip_224.laion2b", 1844.9, 14, 0, "apache-2.0"),
    Model("siglip_vit_b16", "vit_base_patch16_siglip_224.webli", 92.9, 16, 0, "apache-2.0"),
    Model("siglip_vit_l16_256", "vit_large_patch16_siglip_256.webli", 316.0, 16, 0, "apache-2.0"),
    Model("siglip_so400m_p14_378", "vit_so400m_patch14_siglip_378.webli", 428.2, 14, 0, "apache-2.0"),
    Model("siglip2_vit_b16", "vit_base_patch16_siglip_224.v2_webli", 92.9, 16, 0, "apache-2.0"),
    Model("siglip2_vit_l16_256", "vit_large_patch16_siglip_256.v2_webli", 316.0, 16, 0, "apache-2.0"),
    Model("siglip2_so400m_p14_378", "vit_so400m_patch14_siglip_378.v2_webli", 428.2, 14, 0, "apache-2.0"),
    Model("siglip2_vit_g16_256", "vit_giantopt_patch16_siglip_256.v2_webli", 1163.2, 16, 0, "apache-2.0"),
    Model("siglip2_naflex_b16", "naflexvit_base_patch16_siglip.v2_webli", 92.9, 16, 0, "apache-2.0"),
    Model("siglip2_naflex_so400m_p16", "naflexvit_so400m_patch16_siglip.v2_webli", 427.9, 16, 0, "apache-2.0"),
    Model("c-radio_v3-b", "vit_base_patch16_radio_v3.c_radio", 86.5, 16, 7, "nvidia-open-model-license"),
    Model("c-radio_v3-l", "vit_large_patch16_radio_v3.c_radio", 304.2, 16, 7, "nvidia-open-model-license"),
    Model("c-radio_v3-h", "vit_huge_patch16_radio_v3.c_radio", 632.0, 16, 7, "nvidia-open-model-license"),
    Model("c-radio_v3-g", "vit_giant_patch16_radio_v3.c_radio", 1136.0, 16, 7, "nvidia-open-model-license"),
    Model("c-radio_v4-so400m", "vit_so400m_patch16_radio_v4.c_radio", 413.5, 16, 9, "nvidia-open-model-license"),
    Model("c-radio_v4-h", "vit_huge_patch16_radio_v4.c_radio", 632.0, 16, 9, "nvidia-open-model-license"),
    Model("pe_core_b16", "vit_pe_core_base_patch16_224.fb", 93.7, 16, 0, "apache-2.0"),
    Model("pe_core_l14_336", "vit_pe_core_large_patch14_336.fb", 317.2, 14, 0, "apache-2.0"),
    Model("pe_spatial_b16_512", "vit_pe_spatial_base_patch16_512.fb", 86.4, 16, 0, "apache-2.0"),
    Model("pe_spatial_l14_448", "vit_pe_spatial_large_patch14_448.fb", 304.0, 14, 0, "apache-2.0"),
    Model("pe_lang_l14_448", "vit_pe_lang_large_patch14_448.fb", 291.4, 14, 0, "apache-2.0"),
    Model("aimv2_l14", "aimv2_large_patch14_224.apple_pt", 309.2, 14, 0, "apple-ascl"),
    Model("aimv2_l14_448", "aimv2_large_patch14_448.apple_pt", 310.0, 14, 0, "apple-ascl"),
    Model("eva02_b14", "eva02_base_patch14_224.mim_in22k", 85.8, 14, 0, "mit"),
    Model("eva02_l14", "eva02_large_patch14_224.mim_m38m", 303.3, 14, 0, "mit"),
    Model("eva02_clip_b16", "eva02_base_patch16_clip_224.merged2b", 86.3, 16, 0, "mit"),
    Model("eva02_clip_l14", "eva02_large_patch14_clip_224.merged2b", 304.1, 14, 0, "mit"),
    Model("beit_b16", "beit_base_patch16_224.in22k_ft_in22k_in1k", 86.5, 16, 0, "apache-2.0"),
    Model("beit_l16", "beit_large_patch16_224.in22k_ft_in22k_in1k", 304.4, 16, 0, "apache-2.0"),
    Model("beitv2_b16", "beitv2_base_patch16_224.in1k_ft_in22k_in1k", 86.5, 16, 0, "apache-2.0"),
    Model("metaclip_b16", "vit_base_patch16_clip_quickgelu_224.metaclip_2pt5b", 86.2, 16, 0, "cc-by-nc-4.0"),
    Model("metaclip2_h14", "vit_huge_patch14_clip_quickgelu_224.metaclip2_worldwide", 632.1, 14, 0, "cc-by-nc-4.0"),
    Model("metaclip2_h14_378", "vit_huge_patch14_clip_378.metaclip2_worldwide", 632.7, 14, 0, "cc-by-nc-4.0"),
    Model("metaclip2_bigg14", "vit_gigantic_patch14_clip_224.metaclip2_worldwide", 1844.9, 14, 0, "cc-by-nc-4.0"),
    Model("sbb_vit_medium_reg4", "vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k", 38.9, 16, 4, "apache-2.0"),
    Model(
        "sbb_vit_betwixt_reg4", "vit_betwixt_patch16_reg4_gap_256.sbb2_e200_in12k_ft_in1k", 60.4, 16, 4, "apache-2.0"
    ),
    Model("sbb_vit_little_reg1", "vit_little_patch16_reg1_gap_256.sbb_in12k_ft_in1k", 22.5, 16, 1, "apache-2.0"),
    Model("sbb_vit_pwee_reg1", "vit_pwee_patch16_reg1_gap_256.sbb_in1k", 15.3, 16, 1, "apache-2.0"),
)

_BY_NAME = {model.name: model for model in MODELS}
_BY_TIMM_NAME = {model.timm: model.name for model in MODELS if model.timm}


def find(name: str) -> Model | None:
    """The model with this short name."""
    return _BY_NAME.get(name)


def of_official_file(stem: str) -> str | None:
    """The short name, or timm's, of weights whose file has the name that their authors gave it, without suffix.

    `dinov2_vits14_pretrain`, `mae_pretrain_vit_base`, `deit_3_base_224_1k`, `dinov3_vits16_pretrain_lvd1689m-08c60483`.
    """
    timm = _official_files().get(stem)
    if match := re.fullmatch(r"(dinov3_vit\w+)_pretrain_(lvd1689m|sat493m)(-[0-9a-f]{8})?", stem):
        model = find(match[1])
        timm = model and f"{model.timm.split('.')[0]}.{match[2]}"
    return _BY_TIMM_NAME.get(timm or "", timm)


@cache
def _official_files() -> dict[str, str]:
    """Names of files to timm's names, by the addresses that timm knows."""
    import timm

    found = {}
    for module in MODULES:
        for name in timm.list_models(module=module, pretrained=True, include_tags=True):
            cfg = timm.get_pretrained_cfg(name)
            if cfg is not None and cfg.url:
                found[Path(str(cfg.url)).name.removesuffix(".tar").rpartition(".")[0]] = name
    return found


def list_models(filter: str = "") -> list[Model]:
    """Models whose short or timm name contains `filter`, or matches it as a pattern with `*`."""
    pattern = filter.lower() if "*" in filter else f"*{filter.lower()}*"
    return [model for model in MODELS if any(fnmatchcase(n, pattern) for n in (model.name, model.timm))]
