"""What distinguishes one Vision Transformer from another, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from vitreg.common.renamed import accepts_old_names, current_fields
from vitreg.model.preprocess import Preprocess


@dataclass(frozen=True)
class PositionInterpolation:
    """How a checkpoint resizes its learned position embedding to another grid.

    The rule belongs to the weights: features differ visibly when another one is used (transformers #32175).

    Attributes:
        mode: kernel of the interpolation; `"bucket"` takes the position whose cell a patch begins in, as NaViT does;
            `"sincos"` computes the sines and cosines that the table was filled with (AIMv2 native).
        antialias: widen the kernel when shrinking (timm, DINOv2 with registers).
        offset: added to the new grid's sides to form a scale factor, the original DINO and DINOv2 rule
            (`dinov2/hub/backbones.py`, 0.1); 0 resizes to the exact grid.
        align_corners: the corners of both grids coincide (C-RADIOv3).
        square: resize to a square as long as the longer side and cut that, which keeps the aspect ratio (RADIO).
    """

    mode: Literal["bicubic", "bilinear", "bucket", "sincos"] = "bicubic"
    antialias: bool = True
    offset: float = 0.0
    align_corners: bool = False
    square: bool = False


@dataclass(frozen=True)
class RopeConfig:
    """Axial rotary position embedding of the patches (class token and registers are never rotated).

    The angle of frequency j at row y, column x is `y * frequencies[j]` in the first half of the channel pairs
    and `x * frequencies[j]` in the second.

    Attributes:
        frequencies: radians per coordinate unit, head_dim / 4 of them.
        coordinates: `"centered"`: patch centers on [-1, 1] along each side (DINOv3); `"index"`: patch numbers
            from 0.
        offset: added to patch numbers (`"index"`) or to centers before they are scaled (`"centered"`).
        reference_grid: rescale patch numbers so that the grid spans this one (EVA); None leaves them.
        interleaved: rotate neighboring channels together (EVA) instead of the two halves of a head (DINOv3).
        swap_axes: put the column before the row.
        column_frequencies: of columns, where they turn by others than rows (Pixtral).
    """

    frequencies: tuple[float, ...]
    coordinates: Literal["centered", "index"] = "centered"
    offset: float = 0.0
    reference_grid: tuple[int, int] | None = None
    interleaved: bool = False
    swap_axes: bool = False
    column_frequencies: tuple[float, ...] = ()


@accepts_old_names
@dataclass(frozen=True)
class ViTConfig:
    """Everything needed to build a `VisionTransformer`; what a converter reads off a checkpoint.

    Attributes:
        embed_dim: width of a token.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_dim: hidden units of the MLP (of one branch, for SwiGLU).
        patch_size: side of a patch in pixels.
        image_size: (height, width) in pixels of the checkpoint's own position embedding.
        num_registers: tokens added to the input and discarded at the output.
        num_summary_tokens: so many of them, the first, are no scratch memory: the head reads them beside the class
            token (DeiT's distillation token).
        num_test_time_registers: so many of them, the last, are the untrained ones that `register_neurons` write to.
        register_neurons: (block, hidden unit) of the MLP units whose activation is moved, in every image, to the
            test-time registers (see `Mlp`).
        register_weight: tokens that each test-time register counts as in attention (see `Block`).
        register_start: the block before which test-time registers enter the sequence: not after the first that has a
            register neuron. Before it the model is as it was.
        prefix_rows: (block, how many) keys and values that are the same in every image, which the attention of the
            block sees beside those of its tokens (RegCache, arXiv 2510.04547).
        class_token: whether there is one.
        num_classes: outputs of the head (classes, or the width of CLIP's projection); 0 for no head.
        head_bias: whether the head has a bias.
        pool: what the head reads: the class token, the mean of the patches, both concatenated, or an
            attention pool of the patches or of class token and patches (Perception Encoder).
        pool_heads: heads of the attention pool.
        pool_mlp_dim: hidden units of the attention pool's MLP; 0 for as many as the blocks'.
        pool_dim: width of the attention pool where it is not that of tokens, or 0; such a pool has no MLP (CoCa).
        final_norm: normalize all tokens after the last block.
        fc_norm: normalize the pooled feature (instead, for MAE-style and CLIP models).
        patch_norm: normalize the patch embedding, before positions (AIMv2).
        norm_pre: normalize after the position embedding (CLIP).
        patch_bias: whether the patch projection has a bias.
        patch_padding: pixels of zeros around the image, by which its patches are shifted (ViTPose).
        qkv_bias, key_bias: whether queries, keys, values have a bias; DINOv3 masks the keys' part.
        proj_bias, mlp_bias: whether the outputs of attention and the MLP's layers have a bias.
        differential: attention is the difference of two softmaxes (`DifferentialAttention`).
        qk_norm: normalize queries and keys per head.
        attention_norm, mlp_norm: a norm before the output projection of attention or MLP (EVA-02).
        activation: non-linearity of the MLP.
        gated_mlp: `act(gate) * value` in the MLP (SwiGLU with silu).
        parallel: attention and MLP read the same input and are added together (timm's parallel block).
        post_norm: the norms of a block follow its branches, `x + norm(branch(x))` (EVA02-E).
        layer_scale: a learned factor per channel on each branch.
        rms_norm: all norms are RMSNorms instead of LayerNorms (AIMv2).
        norm_eps: epsilon of the norms.
        learned_positions: whether there is a position table for the patches.
        position_interpolation: the checkpoint's rule for other image sizes; where it is not bilinear, tables of offsets
            are resized by BEiT's own.
        rope: rotary embedding, or None.
        rel_pos: a bias on attention by the offset of query and key, from a table (BEiT) or an MLP (`RelPosBias`).
        rel_pos_dim: hidden units of that MLP.
        mixed_rope: rotary embedding whose frequencies are learned per block and head (arXiv 2403.13298).
        preprocess: how images become the checkpoint's input.
        name: where the weights come from, for reports.
        architecture: timm's name of the architecture where there is one.
        changes: what was done to the checkpoint, in sentences.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    image_size: tuple[int, int]
    num_registers: int = 0
    num_summary_tokens: int = 0
    num_test_time_registers: int = 0
    register_neurons: tuple[tuple[int, int], ...] = ()
    register_weight: int = 1
    register_start: int = 0
    prefix_rows: tuple[tuple[int, int], ...] = ()
    class_token: bool = True
    num_classes: int = 0
    head_bias: bool = True
    pool: Literal["token", "mean", "token+mean", "attention", "token+attention"] = "token"
    pool_heads: int = 0
    pool_mlp_dim: int = 0
    pool_dim: int = 0
    final_norm: bool = True
    fc_norm: bool = False
    patch_norm: bool = False
    norm_pre: bool = False
    patch_bias: bool = True
    patch_padding: int = 0
    qkv_bias: bool = True
    key_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    differential: bool = False
    qk_norm: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"
    gated_mlp: bool = False
    parallel: bool = False
    post_norm: bool = False
    layer_scale: bool = False
    rms_norm: bool = False
    norm_eps: float = 1e-6
    learned_positions: bool = True
    position_interpolation: PositionInterpolation = PositionInterpolation()
    rope: RopeConfig | None = None
    mixed_rope: bool = False
    rel_pos: Literal["table", "mlp"] | None = None
    rel_pos_dim: int = 0
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(size=(224, 224)))
    name: str = ""
    architecture: str = ""
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for side in ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size"):
            if getattr(self, side) < 1:
                raise ValueError(f"{side} is {getattr(self, side)}; it must be at least 1")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.differential and (self.head_dim % 2 or self.rope):
            raise ValueError("differential attention needs heads of an even number of channels, and has no RoPE here")
        if self.post_norm and self.parallel:
            raise ValueError("post_norm and parallel: a parallel block has one norm, before both branches; choose one")
        if self.mixed_rope and (self.rope or self.differential):
            raise ValueError(
                "mixed_rope has frequencies of its own, and no differential attention; leave out the other"
            )
        if self.rel_pos and (self.rope or self.mixed_rope or self.differential):
            raise ValueError("rel_pos biases plain attention without RoPE; leave out rope, mixed_rope and differential")
        if (self.rel_pos == "mlp") != (self.rel_pos_dim > 0):
            raise ValueError(
                f"rel_pos is {self.rel_pos!r} and rel_pos_dim {self.rel_pos_dim}: an MLP has 1 unit or more"
            )
        if self.num_registers < 0:
            raise ValueError(f"num_registers is {self.num_registers}; it must be 0 or more")
        if self.num_summary_tokens and (self.pool != "token" or self.num_summary_tokens > self.num_registers):
            raise ValueError(
                f"num_summary_tokens is {self.num_summary_tokens}: it counts the first of the {self.num_registers} "
                f"registers, which pool 'token' reads beside the class token, and pool is {self.pool!r}"
            )
        self._check_register_neurons()
        if not all(0 <= block < self.depth and rows > 0 for block, rows in self.prefix_rows):
            raise ValueError(
                f"prefix_rows {self.prefix_rows}: the model has blocks 0 to {self.depth - 1}; give 1 row or more"
            )
        if self.pool_dim and "attention" not in self.pool:
            raise ValueError(f"pool_dim is {self.pool_dim}, but pool {self.pool!r} is no attention pool; leave it out")
        if "token" in self.pool and not self.class_token:
            raise ValueError(f"pool {self.pool!r} needs a class token; use 'mean' or 'attention'")
        if min(self.grid) < 1:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size} pixels")
        if self.rope and 4 * len(self.rope.frequencies) != self.head_dim:
            raise ValueError(
                f"RoPE needs head_dim / 4 = {self.head_dim / 4:g} frequencies, got {len(self.rope.frequencies)}"
            )

    def _check_register_neurons(self) -> None:
        if not 0 <= self.num_test_time_registers <= self.num_registers:
            raise ValueError(
                f"num_test_time_registers is {self.num_test_time_registers}; it must be 0 to num_registers "
                f"({self.num_registers}), which counts them"
            )
        if bool(self.register_neurons) != bool(self.num_test_time_registers):
            raise ValueError(
                f"{len(self.register_neurons)} register_neurons and {self.num_test_time_registers} test-time "
                f"registers: neurons need a register to write to, and a test-time register neurons that do"
            )
        if self.register_weight < 1:
            raise ValueError(f"register_weight is {self.register_weight}; it must be at least 1")
        first = min((block for block, _ in self.register_neurons), default=0)
        if not 0 <= self.register_start <= first:
            raise ValueError(
                f"register_start is {self.register_start}; it must be 0 to {first}, the first block with a register "
                f"neuron (0 without)"
            )
        for block, unit in self.register_neurons:
            if not (0 <= block < self.depth and 0 <= unit < self.mlp_dim):
                raise ValueError(
                    f"register neuron (block {block}, unit {unit}) does not exist: the model has blocks 0 to "
                    f"{self.depth - 1} and units 0 to {self.mlp_dim - 1}; give neurons that were found in this model"
                )
        if len(set(self.register_neurons)) < len(self.register_neurons):
            raise ValueError("register_neurons name a unit twice")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_features(self) -> int:
        """Width of the pooled feature, which the head reads."""
        width = self.pool_dim or self.embed_dim
        return width * (1 + (self.pool == "token+mean") + self.num_summary_tokens)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch inside the model."""
        return int(self.class_token) + self.num_registers

    @property
    def signed_units(self) -> bool:
        """Whether hidden units may be negative; elsewhere the non-linearity bounds what is, at -0.3."""
        return self.gated_mlp or self.mlp_norm

    @property
    def test_time_registers(self) -> slice:
        """Where in the sequence the test-time registers are: the last before the patches."""
        return slice(self.num_prefix_tokens - self.num_test_time_registers, self.num_prefix_tokens)

    @property
    def num_attention_copies(self) -> int:
        """Copies of test-time registers that attention sees before the sequence, in blocks that have them."""
        return self.num_test_time_registers * (self.register_weight - 1)

    def num_waiting(self, block: int) -> int:
        """Test-time registers that have not entered the sequence in a block yet."""
        return self.num_test_time_registers if block < self.register_start else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViTConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: a key is unknown, as in a file of a newer vitreg.
        """
        values = current_fields(values)
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown ViTConfig keys {unknown[:5]}: the file is from a newer vitreg, upgrade to read it"
            )
        values["position_interpolation"] = PositionInterpolation(**values["position_interpolation"])
        values["preprocess"] = Preprocess(**_tuples(current_fields(values["preprocess"])))
        if values.get("rope"):
            values["rope"] = RopeConfig(**_tuples(values["rope"]))
        for name in ("register_neurons", "prefix_rows"):
            values[name] = [tuple(pair) for pair in values.get(name, ())]
        return cls(**_tuples(values))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, and a frozen config must be hashable."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
