"""The Vision Transformer with registers: one class for every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitreg.model.attention import Attention
from vitreg.model.block import Block, Subset
from vitreg.model.config import ViTConfig
from vitreg.model.differential import DifferentialAttention
from vitreg.model.norm import norm_layer
from vitreg.model.pooling import AttentionPool
from vitreg.model.pos_embed import resize_positions
from vitreg.model.preprocess import Preprocess
from vitreg.model.rel_pos import RelPosBias
from vitreg.model.rope import Rotation, mixed_rotation, rotation
from vitreg.model.tokens import Masked, Tokens
from vitreg.model.trace import Facet, Query, Recorder, Summary, Trace

# DINOv3's value. Registers must differ from the start: they take no position embedding, so identical ones
# receive identical gradients and stay identical for ever (timm PR #2229).
REGISTER_STD = 0.02


class VisionTransformer(nn.Module):
    """A Vision Transformer with any number of registers.

    Inside, the sequence is `[cls, registers, patches]`; registers are inserted after the position embedding
    and get none ("Vision Transformers Need Registers", section 3 and `dinov2/models/vision_transformer.py`).
    Outside, tokens have names. Images may have any size whose sides are multiples of the patch size.

    Args:
        config: the architecture; converters read it off a checkpoint.

    Attributes:
        config: as given.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        stochastic_depth: in training, draws the images that take the branches of each block, from how many there are
            and where; None for all of them.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.stochastic_depth: Callable[[int, torch.device], Sequence[tuple[Subset, Subset]]] | None = None
        dim, patch = config.embed_dim, config.patch_size
        self.patch_embed = nn.Conv2d(
            3, dim, kernel_size=patch, stride=patch, padding=config.patch_padding, bias=config.patch_bias
        )
        self.patch_norm = norm_layer(config, dim) if config.patch_norm else nn.Identity()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.registers = nn.Parameter(torch.empty(1, config.num_registers, dim)) if config.num_registers else None
        self.pos_embed = None
        if config.learned_positions:
            self.pos_embed = nn.Parameter(torch.empty(1, config.grid[0] * config.grid[1], dim))
        self.rope_frequencies = None
        if config.mixed_rope:
            self.rope_frequencies = nn.Parameter(torch.empty(2, config.depth, config.num_heads, config.head_dim // 2))
        self.norm_pre = norm_layer(config, dim) if config.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = norm_layer(config, dim) if config.final_norm else nn.Identity()
        self.attention_pool = AttentionPool(config) if "attention" in config.pool else None
        width = config.pool_dim or dim
        self.fc_norm = norm_layer(config, width) if config.fc_norm else nn.Identity()
        self.head = (
            nn.Linear(config.num_features, config.num_classes, bias=config.head_bias) if config.num_classes else None
        )
        if not self.patch_embed.weight.is_meta:  # nothing to fill there, and `normal_` would import Dynamo, in 1.2 s
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights (std 0.02), zero biases, LayerScale 1e-5, small distinct registers."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, DifferentialAttention):
                module.reset_lambdas()
            elif isinstance(module, Block):
                for scale in (module.ls1, module.ls2):
                    if scale is not None:
                        nn.init.constant_(scale, 1e-5)
            elif isinstance(module, RelPosBias) and module.table is not None:
                nn.init.trunc_normal_(module.table, std=0.02)
            elif isinstance(module, AttentionPool):
                nn.init.trunc_normal_(module.latent, std=self.config.embed_dim**-0.5)
        prefixes = [module.prefix for module in self.modules() if isinstance(module, Attention)]
        for token in (self.cls_token, self.pos_embed, *prefixes):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if self.rope_frequencies is not None:
            nn.init.trunc_normal_(self.rope_frequencies, std=0.5)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=REGISTER_STD)

    @property
    def num_registers(self) -> int:
        """Registers in the sequence."""
        return self.config.num_registers

    @property
    def preprocess(self) -> Preprocess:
        """Turns an image into the checkpoint's input (mean, std, size, interpolation)."""
        return self.config.preprocess

    def forward(self, images: Float[Tensor, "B 3 H W"], masked: Masked | None = None) -> Tokens:
        """The tokens after the last block and, where there is one before pooling, after the final norm.

        Args:
            images: normalized as `preprocess` does; sides are multiples of the patch size.
            masked: patches that a mask token replaces, for masked image modelling.

        Raises:
            ValueError: the images do not fit the model.
        """
        return self._run(images, None, masked=masked)

    def pool(self, tokens: Tokens) -> Float[Tensor, "B F"]:
        """One feature per image, as the checkpoint's head reads it. Registers take no part, summary tokens do."""
        if self.attention_pool is not None:
            read = tokens.patches
            if tokens.cls is not None and self.config.pool == "token+attention":
                read = torch.cat([tokens.cls.unsqueeze(1), read], dim=1)
            return self.fc_norm(self.attention_pool(read))
        if self.config.pool == "mean":
            return self.fc_norm(tokens.patches.mean(1))
        assert tokens.cls is not None  # ViTConfig refuses these pools without one
        pooled = tokens.cls
        if self.config.pool == "token+mean":
            pooled = torch.cat([pooled, tokens.patches.mean(1)], dim=-1)
        if count := self.config.num_summary_tokens:
            pooled = torch.cat([pooled, tokens.registers[:, :count].flatten(1)], dim=-1)
        return self.fc_norm(pooled)

    def classify(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        """The output of the checkpoint's head: class logits, or for CLIP the projected image embedding.

        Raises:
            ValueError: the checkpoint has no head.
        """
        if self.head is None:
            raise ValueError("this checkpoint has no classification head; use vit(images) for its features")
        return self.head(self.pool(self(images)))

    def trace(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        blocks: Iterable[int] | None = None,
        attention_from: Query | Sequence[Query] | None = None,
        facets: Sequence[Facet] = (),
        patches: bool = False,
        activations: bool = False,
        hidden: bool = False,
        embeddings: bool = False,
        largest: int = 0,
        summaries: Mapping[str, Summary] = MappingProxyType({}),
    ) -> Trace:
        """A forward pass that also records norms, and on request what happens inside the blocks.

        The pass is the same fused one as `forward`; attention rows are recomputed exactly from queries and
        keys, so no N x N matrix exists at any time.

        Args:
            images: as for `forward`.
            blocks: blocks to record from, counted from 0 (negative from the end); None for all.
            attention_from: queries whose attention rows are wanted: `"cls"`, `"registers"`, patches by
                number or by (row, column), or a list of these.
            facets: any of `"queries"`, `"keys"`, `"values"`.
            patches: keep the patches' hidden states after each block.
            activations: keep the MLPs' hidden units.
            hidden: keep all tokens' hidden states after each block.
            embeddings: keep the patch embeddings.
            largest: keep the hidden states of so many patches, those with the largest norms, after every block.
            summaries: by name, what to compute of an intermediate instead of keeping it (`Summary`).

        Raises:
            ValueError: the images do not fit, or something is asked for that the model does not have.
        """
        recorder = Recorder(
            self.config,
            self._grid(images),
            blocks=blocks,
            attention_from=attention_from,
            facets=facets,
            also={"patches": patches, "activations": activations, "hidden": hidden},
            largest=largest,
            summaries=summaries,
        )
        return recorder.finish(self._run(images, recorder, keep_embeddings=embeddings))

    def _run(
        self,
        images: Tensor,
        recorder: Recorder | None,
        *,
        keep_embeddings: bool = False,
        masked: Masked | None = None,
    ) -> Tokens:
        grid = self._grid(images)
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        x = self.patch_norm(x)
        if masked is not None:
            x = torch.where(masked.where.unsqueeze(-1), masked.token.to(x.dtype), x)
        if recorder is not None and keep_embeddings:
            recorder.embeddings = x
        x = self._assemble(x, grid)
        table = None
        unrotated = self.config.num_attention_copies + self.config.num_prefix_tokens
        if self.config.rope is not None:
            table = rotation(self.config.rope, grid, unrotated, x.device)
        elif self.config.rel_pos:
            table = grid
        tables = None
        if self.rope_frequencies is not None:
            tables = mixed_rotation(self.rope_frequencies, grid, unrotated)
        subsets = None
        if self.stochastic_depth is not None and self.training:
            subsets = self.stochastic_depth(x.shape[0], x.device)
        waiting = None
        if self.config.register_start:
            place = self.config.test_time_registers
            x, waiting = torch.cat((x[:, : place.start], x[:, place.stop :]), dim=1), x[:, place]
        for i, block in enumerate(self.blocks):
            if waiting is not None and i == self.config.register_start:
                x, waiting = self._enter(x, waiting), None
            record = recorder.record if recorder is not None and recorder.wants(i) else None
            table = table if tables is None else tables[i]
            position = table
            if waiting is not None and table is not None and not self.config.rel_pos:
                cos, sin = cast("Rotation", table)
                skip = self.config.num_attention_copies + waiting.shape[1]  # what is not rotated comes first
                position = cos[..., skip:, :], sin[..., skip:, :]
            options = (record, None if subsets is None else subsets[i])
            if self.gradient_checkpointing and self.training and record is None:
                x = checkpoint(block, x, position, *options, use_reentrant=False)
            else:
                x = block(x, position, *options)
            if recorder is not None:
                recorder.after_block(i, x if waiting is None else self._enter(x, waiting))
        return Tokens.split(self.norm(x), class_token=self.config.class_token, grid=grid, normed=self.config.final_norm)

    def _assemble(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """`[cls, registers, patches]`, the patches with their positions."""
        if self.pos_embed is not None:
            rule = self.config.position_interpolation
            patches = patches + resize_positions(self.pos_embed, self.config.grid, grid, rule)
        batch = patches.shape[0]
        prefix = [token.expand(batch, -1, -1) for token in (self.cls_token, self.registers) if token is not None]
        return self.norm_pre(torch.cat([*prefix, patches], dim=1) if prefix else patches)

    def _enter(self, x: Tensor, registers: Tensor) -> Tensor:
        """The sequence with the test-time registers."""
        before, after = x.tensor_split([self.config.test_time_registers.start], dim=1)
        return torch.cat((before, registers, after), dim=1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        patch = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {list(images.shape)}; expected [B, 3, H, W]")
        height, width = images.shape[-2:]
        if height % patch or width % patch or not (height and width):
            raise ValueError(
                f"images are {height} x {width} pixels; both sides must be multiples of the patch size "
                f"{patch} (vit.preprocess resizes to one that is)"
            )
        return height // patch, width // patch
