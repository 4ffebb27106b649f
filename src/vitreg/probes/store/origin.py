"""What features are of: the model, its preprocessing, the images, and what was kept."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from vitreg.checkpoints.state import digest
from vitreg.images import ImageSet, Shards
from vitreg.model import Preprocess, VisionTransformer, ViTConfig
from vitreg.probes.store.names import StoredType, Token

Made = TypeVar("Made")

_ROW_BYTES = 72
"""Of an image besides its features: id, size, grid, and what Parquet notes of its lists."""


@dataclass(frozen=True)
class FeaturesConfig:
    """What a feature pass keeps: of all images little, of `patches` of them what is large.

    Attributes:
        blocks: whose class tokens are kept, counted from 0, negative from the end.
        patches: keep patch tokens, registers, and the patches' norms after every block of so many images, evenly spread
            over the set; None for all.
        patch_blocks: whose patch tokens and registers are kept, and of all images the mean patch; None for those of
            `blocks`.
        tokens: which of these are kept: the class token, registers, patches, their mean, and what the head reads.
        norm_blocks: the blocks of which every patch's norm is kept; None for all.
        normed: apply the model's final norm to the tokens, as timm's `get_intermediate_layers(norm=True)` does. Norms
            are taken before it in any case.
        dtype: of the stored tokens; norms are float32.
        shard_size: images a file.
    """

    blocks: tuple[int, ...] = (-1,)
    patches: int | None = None
    patch_blocks: tuple[int, ...] | None = None
    tokens: tuple[Token, ...] = get_args(Token)
    norm_blocks: tuple[int, ...] | None = None
    normed: bool = True
    dtype: StoredType = "float16"
    shard_size: int = 4096

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks is empty; name at least one, such as -1 for the last")
        if self.patches is not None and self.patches < 0:
            raise ValueError(f"patches is {self.patches}; it must be a number of images, or None for all")
        if unknown := {*self.tokens} - {*get_args(Token)}:
            raise ValueError(f"tokens has {sorted(unknown)[0]!r}; choose from {', '.join(get_args(Token))}")
        if self.dtype not in get_args(StoredType):
            raise ValueError(f"dtype is {self.dtype!r}; choose {' or '.join(get_args(StoredType))}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}; it must be at least 1")

    def for_depth(self, depth: int) -> FeaturesConfig:
        """With the blocks of a model of `depth` counted from 0, sorted, each once.

        Raises:
            ValueError: the model does not have one of them.
        """
        patch_blocks = self.blocks if self.patch_blocks is None else self.patch_blocks
        norm_blocks = tuple(range(depth)) if self.norm_blocks is None else self.norm_blocks
        if wrong := [block for block in (*self.blocks, *patch_blocks, *norm_blocks) if not -depth <= block < depth]:
            raise ValueError(
                f"block {wrong[0]} does not exist: the model has blocks 0 to {depth - 1} (or -1 for the last)"
            )
        blocks, patch_blocks, norm_blocks = (
            tuple(sorted({block % depth for block in some})) for some in (self.blocks, patch_blocks, norm_blocks)
        )
        if not set(patch_blocks) <= set(blocks):
            raise ValueError(f"patch_blocks {patch_blocks} must be among the blocks {blocks}")
        return dataclasses.replace(self, blocks=blocks, patch_blocks=patch_blocks, norm_blocks=norm_blocks)

    def column(self, token: str, block: int) -> str:
        """What a store calls the tokens of a block: the name alone where there is one block only."""
        return token if len(self.blocks) == 1 else f"{token}_{block}"

    def shapes(self, model: ViTConfig, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Of what is kept of one image, by the name of its column; what is empty is left out."""
        config, dim = self.for_depth(model.depth), model.embed_dim
        assert config.patch_blocks is not None
        assert config.norm_blocks is not None
        found: dict[str, tuple[int, ...]] = {}
        if "pooled" in self.tokens:
            found["pooled"] = (model.num_features,)
        for block in config.blocks:
            kinds: dict[Token, tuple[int, ...]] = {"cls": (dim,)} if model.class_token else {}
            if block in config.patch_blocks:
                kinds["mean"] = (dim,)
            if block in config.patch_blocks and self.patches != 0:
                kinds |= {"registers": (model.num_registers, dim), "patches": (grid[0] * grid[1], dim)}
            found |= {config.column(kind, block): shape for kind, shape in kinds.items() if kind in self.tokens}
        if self.patches != 0:
            found["norms"] = (len(config.norm_blocks), *grid)
        return {name: shape for name, shape in found.items() if math.prod(shape)}

    def dtype_of(self, column: str) -> StoredType:
        """In which a column is kept."""
        return "float32" if column == "norms" else self.dtype

    def of_some(self, column: str) -> bool:
        """Whether a column is of those `patches` images only."""
        return column.split("_")[0] in ("norms", "patches", "registers")

    def covers(self, other: FeaturesConfig) -> bool:
        """Whether what the other keeps, both `for_depth`, is there; shards may be of other sizes."""
        return (
            {*self.blocks} >= {*other.blocks}
            and {*(self.patch_blocks or ())} >= {*(other.patch_blocks or ())}
            and other.patches in (0, self.patches)
            and {*self.tokens} >= {*other.tokens}
            and self.norm_blocks == other.norm_blocks
            and (self.normed, self.dtype) == (other.normed, other.dtype)
        )

    def num_bytes(self, model: ViTConfig, preprocess: Preprocess, num_images: int) -> int:
        """What the features of so many images of a set take on the disk, but for the headers of the files."""
        rows, columns = (side // model.patch_size for side in preprocess.size)
        total = num_images * _ROW_BYTES
        for name, shape in self.shapes(model, (rows, columns)).items():
            some = self.patches if self.of_some(name) else None
            count = num_images if some is None else min(some, num_images)
            total += count * math.prod(shape) * (2 if self.dtype_of(name) == "float16" else 4)
        return total


@dataclass(frozen=True)
class StoredModel:
    """The model: what to call it, and a digest of its weights and architecture."""

    name: str
    digest: str

    @classmethod
    def of(cls, vit: VisionTransformer) -> StoredModel:
        """That of a model, which is the same under any name; preprocessing is compared by itself."""
        architecture = dataclasses.replace(vit.config, preprocess=Preprocess(), name="", changes=())
        name = vit.config.name or vit.config.architecture or "Vision Transformer"
        return cls(name, digest(architecture, vit.state_dict()))

    def __str__(self) -> str:
        return f"{self.name} (weights {self.digest[:8]})"


@dataclass(frozen=True)
class StoredData:
    """The images: where they are from, how many, and a digest of their list.

    Attributes:
        source: where they are from.
        number: of the images, or of the archives that they are in where `unit` says so.
        digest: `ImageSet.digest`, or that of the archives.
        unit: what is counted.
    """

    source: str
    number: int
    digest: str
    unit: str = "images"

    @classmethod
    def of(cls, images: ImageSet | Shards) -> StoredData:
        """That of a set."""
        if isinstance(images, ImageSet):
            return cls(images.source, len(images), images.digest())
        if images.num_images is None:
            return cls(images.images.source, len(images), images.digest(), "archives")
        return cls(images.images.source, images.num_images, images.digest())

    def __str__(self) -> str:
        return f"{self.source} ({self.number} {self.unit}, list {self.digest[:8]})"


@dataclass(frozen=True)
class Origin:
    """All that decides what is in a store, but the size of batches and the machine."""

    model: StoredModel
    preprocess: Preprocess
    data: StoredData
    config: FeaturesConfig

    @classmethod
    def of(
        cls, vit: VisionTransformer, images: ImageSet | Shards, preprocess: Preprocess, config: FeaturesConfig
    ) -> Origin:
        """That of the features which `extract` is about to compute."""
        return cls(StoredModel.of(vit), preprocess, StoredData.of(images), config.for_depth(vit.config.depth))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Origin:
        """What `dataclasses.asdict` and JSON, which has no tuples, made of one."""
        kinds: tuple[Any, ...] = (StoredModel, Preprocess, StoredData, FeaturesConfig)
        return cls(*(from_json(kind, values[part]) for kind, part in zip(kinds, PARTS, strict=True)))

    @property
    def identity(self) -> dict[Part, Any]:
        """What is compared of each part: of model and images their digests, whatever they are called."""
        return {
            "model": self.model.digest,
            "preprocess": self.preprocess,
            "data": self.data.digest,
            "config": self.config,
        }

    def digest(self) -> str:
        """A name for it, which every shard carries."""
        return hashlib.blake2b(repr(tuple(self.identity.values())).encode(), digest_size=16).hexdigest()

    def shard_digest(self, content: str) -> str:
        """A name for what is kept of a shard with this content, which its file carries."""
        parts = dict(self.identity)
        # Which of the images have patches follows from their number.
        parts["data"] = None if self.config.patches is None else self.data.number
        return hashlib.blake2b(repr((*parts.values(), content)).encode(), digest_size=8).hexdigest()

    def covers(self, other: Origin) -> bool:
        """Whether features of this are, or hold, those of the other."""
        same_config = dataclasses.replace(other, config=self.config)
        return self.identity == same_config.identity and self.config.covers(other.config)


def from_json(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """One of a class of fields, from JSON, which has no tuples."""
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


Part = Literal["model", "preprocess", "data", "config"]
PARTS: dict[Part, str] = {
    "model": "model",
    "preprocess": "preprocessing",
    "data": "set of images",
    "config": "config",
}


def check_same(path: Path, stored: Origin, wanted: Origin, parts: Iterable[Part] = PARTS) -> None:
    """Refuse features at a path that are of something else than is wanted, in some parts.

    Raises:
        ValueError: they differ; the message has both.
    """
    for part in parts:
        if stored.identity[part] != wanted.identity[part]:
            theirs, ours = getattr(stored, part), getattr(wanted, part)
            if part in ("preprocess", "config"):
                names = [f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]
                theirs, ours = (", ".join(f"{name} {getattr(of, name)}" for name in names) for of in (theirs, ours))
            raise ValueError(
                f"{path} holds features of another {PARTS[part]}: {theirs}, not {ours}; choose another folder"
            )
