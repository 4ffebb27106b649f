"""What other libraries call the weights of a Vision Transformer: one table a library, read by `from_*` and `to_*`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightNames:
    """The names of one library, old ones included.

    Ours are those of `VisionTransformer.state_dict()`, and those of the parts that libraries keep apart or fuse
    (`weights.py`).

    Attributes:
        rules: a pattern in their names, and what stands in its place in ours; all are applied, in order.
        unused: what is no part of the Vision Transformer.
    """

    rules: Mapping[str, str]
    unused: str

    def ours(self, name: str) -> str | None:
        """Our name for one of theirs; None for what is no part of the Vision Transformer."""
        if re.search(self.unused, name):
            return None
        for pattern, replacement in self.rules.items():
            name = re.sub(pattern, replacement, name)
        return name

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict under our names."""
        return {name: tensor for key, tensor in state.items() if (name := self.ours(key)) is not None}

    def norm_after_pool(self) -> WeightNames:
        """The same where the last norm takes the pooled feature."""
        return dataclasses.replace(self, rules={**self.rules, r"^norm\.": "fc_norm."})


TIMM = WeightNames(
    rules={
        r"^embeds\.proj\.": "patch_embed.",
        r"^embeds\.norm\.": "patch_norm.",
        r"^embeds\.": "",
        r"^(reg|dist)_token$": "registers",
        r"^patch_embed\.proj\.": "patch_embed.",
        r"^patch_embed\.norm\.": "patch_norm.",
        r"^attn_pool\.": "attention_pool.",
        r"^rope\.freqs$": "rope_frequencies",
        r"^(shared_rel_pos|rel_pos_bias)\.": "blocks.*.attn.rel_pos.",
        r"\.relative_position_bias_table$": ".table",
        r"\.attn\.table$": ".attn.rel_pos.table",
        r"\.rel_pos\.mlp\.": ".rel_pos.",
        r"\.(ls1?\.gamma|gamma_1)$": ".ls1",
        r"\.(ls2\.gamma|gamma_2)$": ".ls2",
        r"\.attn\.([qkv])_proj\.": r".attn.\1.",
        r"\.attn\.([qv])_bias$": r".attn.\1.bias",
        r"\.mlp\.fc1_g\.": ".mlp.gate.",
        r"\.mlp\.fc1_x\.": ".mlp.up.",
        # A parallel block is its own attention and MLP.
        r"^(blocks\.\d+)\.(q_norm|k_norm|sub_norm|lambda_..)": r"\1.attn.\2",
        r"\.in_norm\.": ".norm1.",
        r"\.attn_out_proj\.": ".attn.proj.",
        r"\.mlp_out_proj\.": ".mlp.fc2.",
        r"\.mlp_bias$": ".mlp.fc1.bias",
    },
    unused=r"^(?!(embeds|blocks|patch_embed|norm_pre|norm|fc_norm|head|head_dist|attn_pool|shared_rel_pos|rel_pos_bias)\.|"
    r"((cls|reg|dist)_token|pos_embed|rope\.freqs)$)",
)

# transformers 4 nests more than transformers 5; both arrive at the same name.
TRANSFORMERS = WeightNames(
    rules={
        r"^(vit|ijepa|deit|beit|data2vec_vision|dinov2|dinov2_with_registers|vision_model)\.": "",
        r"^head\.attention\.in_proj_": "attention_pool.in_proj.",
        r"^head\.attention\.out_proj\.": "attention_pool.proj.",
        r"^head\.layernorm\.": "attention_pool.norm.",
        r"^head\.probe$": "attention_pool.latent",
        r"^head\.": "attention_pool.",
        r"^(classifier|cls_classifier|visual_projection)\.": "head.",
        r"(^|\.)pooler\.layernorm\.": "fc_norm.",
        r"^(encoder\.relative|shared)_position_bias\.relative_position_bias_table$": "blocks.*.attn.rel_pos.table",
        r"\.(attention\.attention\.)?relative_position_bias\.relative_position_bias_table$": ".attn.rel_pos.table",
        r"^distillation_classifier\.": "head_dist.",
        r"^embeddings\.rms_norm\.": "patch_norm.",
        r"^embeddings\.": "",
        r"^(cls_token|cls_register_token|class_embedding)$": "cls_token",
        r"^(register_tokens|distillation_token|detection_tokens)$": "registers",
        r"^(position_embeddings?(\.weight)?|positional_embedding_vlm)$": "pos_embed",
        r"^patch_(embeddings?|projection|conv)\.((projection|linear)\.)?": "patch_embed.",
        r"^(pre_layernorm|pre_layrnorm|layernorm_pre|ln_pre)\.": "norm_pre.",
        r"^(layernorm|post_layernorm|layernorm_post|rms_norm)\.": "norm.",
        r"^((encoder|model|transformer)\.)?layers?\.": "blocks.",
        r"\.(attention\.attention|attention|self_attn)\.(q_proj|query)\.": ".attn.q.",
        r"\.(attention\.attention|attention|self_attn)\.(k_proj|key)\.": ".attn.k.",
        r"\.(attention\.attention|attention|self_attn)\.(v_proj|value)\.": ".attn.v.",
        r"\.self_attn\.qkv\.": ".attn.qkv.",
        r"\.(attention\.output\.dense|(attention|self_attn)\.(o_proj|out_proj|projection(_layer)?))\.": ".attn.proj.",
        r"\.(ffn|feed_forward)\.": ".mlp.",
        r"\.(intermediate\.dense|mlp\.weights_in)\.": ".mlp.fc1.",
        r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.": ".mlp.fc2.",
        r"\.mlp\.gate_proj\.": ".mlp.gate.",
        r"\.mlp\.up_proj\.": ".mlp.up.",
        r"\.(layernorm_before|layer_norm1|input_layernorm|attention_norm|rms_norm1)\.": ".norm1.",
        r"\.(layernorm_after|layer_norm2|post_attention_layernorm|ffn_norm|rms_norm2)\.": ".norm2.",
        r"\.(layer_scale(\d)\.lambda1|lambda_(\d))$": r".ls\2\3",
    },
    # Other towers, training-time parts and ViTModel's pooler (a layer for next-sentence prediction, from BERT).
    unused=r"^(text_|logit_|decoder\.|vision_adapter\.|input_conditioner\.|summary_idxs$)"
    r"|(^|\.)(pooler\.(?!layernorm)|mask_token$|position_ids$|relative_position_index$|inv_freq$|video_patch_projection\.)",
)

OPEN_CLIP = WeightNames(
    rules={
        r"^conv1\.": "patch_embed.",
        r"^class_embedding$": "cls_token",
        r"^positional_embedding$": "pos_embed",
        r"^proj$": "head.weight",
        r"^ln_pre\.": "norm_pre.",
        r"^ln_post\.": "norm.",
        r"^transformer\.resblocks\.": "blocks.",
        r"\.attn\.in_proj_": ".attn.qkv.",
        r"\.attn\.out_proj\.": ".attn.proj.",
        r"\.attn\.ln_([qk])\.": r".attn.\1_norm.",
        r"\.attn\.ln_inner\.": ".attn.norm.",
        r"\.mlp\.c_fc\.": ".mlp.fc1.",
        r"\.mlp\.c_proj\.": ".mlp.fc2.",
        r"\.mlp\.ln\.": ".mlp.norm.",
        r"\.ln_([12])\.": r".norm\1.",
        r"\.ls_([12])\.gamma$": r".ls\1",
    },
    unused=r"^(?!(conv1|ln_pre|ln_post|transformer)\.|(class_embedding|positional_embedding|proj)$)",
)
