"""A frozen teacher's tokens, projected to the student's width, computed once for each view of an image."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.checkpoints.state import digest
from vitreg.common.disk import check_room, writing
from vitreg.model import Tokens, Trace, VisionTransformer, ViTConfig
from vitreg.training.recipes.configs import DistillConfig


@dataclass(frozen=True)
class Targets:
    """What a student learns from a batch, float32.

    Attributes:
        tokens: of the chosen blocks: the class token where there is one, then the patches.
        register: the mean of the registers; 0 or 1 of them.
        attention: rows of the class token (`attention_row`); of length 0 without one.
        output: of the head, or else the pooled feature, projected.
    """

    tokens: Float[Tensor, "B L T D"]
    register: Float[Tensor, "B L R D"]
    attention: Float[Tensor, "B L K"]
    output: Float[Tensor, "B C"]


class Teacher:
    """A frozen model as a source of targets. No module, so that no checkpoint holds it and no process shards it.

    With a cache, what it says of a view is kept in a file, in half precision, and found again by the view's number, by
    any process and any run with the same teacher. A fingerprint of the pixels is kept with it, so that other images
    under the same numbers are not mistaken for these.

    Args:
        vit: the teacher.
        blocks: whose tokens and attention are wanted.
        student: of which the projection has the width.
        config: says where the cache is, and of how many views.
    """

    def __init__(self, vit: VisionTransformer, blocks: tuple[int, ...], student: ViTConfig, config: DistillConfig):
        self.vit = vit.eval().requires_grad_(False)
        self.blocks, self._config = blocks, config
        num_patches = student.grid[0] * student.grid[1]
        registers, cls = min(vit.num_registers, 1), int(vit.config.class_token)
        levels, dim = len(blocks), student.embed_dim
        self._shapes = (
            (levels, cls + num_patches, dim),
            (levels, registers, dim),
            (levels, cls * (cls + registers + num_patches)),
            (vit.config.num_classes or dim,),
            (FINGERPRINT**2,),
        )
        self._key = ""
        self._files: dict[int, np.memmap] = {}

    @torch.no_grad()
    def fit_projection(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "Ds Dt"]:
        """The principal directions of the teacher's tokens, each of length 1, on these images of every process.

        Not centered, so that an artifact keeps its norm: artifacts share a direction, which is among the first.
        A student that is as wide has the teacher's own channels, a wider one others beside them.
        """
        width = self._shapes[0][-1]
        if width >= self.vit.config.embed_dim:
            return torch.eye(width, self.vit.config.embed_dim)
        hidden = self._trace(images).hidden
        assert hidden is not None
        tokens = F.normalize(hidden.sequence().flatten(0, -2).double(), dim=-1)
        gram = tokens.T @ tokens
        if dist.is_initialized():
            dist.all_reduce(gram)
        return torch.linalg.eigh(gram.cpu()).eigenvectors[:, -width:].flip(1).T.float()

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "B 3 H W"], views: Int[Tensor, " B"] | None, projection: Float[Tensor, "Ds Dt"]
    ) -> Targets:
        """The targets of images; of views that were seen before, with a cache, from it.

        Raises:
            ValueError: the cache cannot be written.
        """
        if not self._config.cache or views is None:
            return self._targets(self._compute(images, projection))
        prints = _fingerprint(images).cpu().numpy()
        places = [(self._open(view // FILE_ROWS, projection), view % FILE_ROWS) for view in views.tolist()]
        kept = np.stack([rows[row] for rows, row in places])
        known = np.isclose(kept[:, -(FINGERPRINT**2) :], prints, atol=0.02, rtol=0.01).all(1)
        if not known.all():
            new = torch.from_numpy(~known).to(images.device)
            kept[~known] = self._compute(images[new], projection).half().cpu().numpy()
            for i in np.flatnonzero(~known):
                rows, row = places[i]
                rows[row] = kept[i]
        return self._targets(torch.from_numpy(kept).to(images.device).float())

    def _trace(self, images: Tensor) -> Trace:
        if next(self.vit.parameters()).device != images.device:
            self.vit.to(images.device)
        row = "cls" if self.vit.config.class_token else None
        return self.vit.trace(images, blocks=self.blocks, hidden=True, attention_from=row)

    def _compute(self, images: Tensor, projection: Tensor) -> Float[Tensor, "B row"]:
        """The targets of each image in a row."""
        trace = self._trace(images)
        hidden = trace.hidden
        assert hidden is not None
        with torch.autocast(images.device.type, enabled=False):
            rows = [tokens.float() @ projection.T for tokens in (without_registers(hidden), hidden.registers)]
            rows[1] = rows[1].mean(-2, keepdim=True) if rows[1].shape[-2] else rows[1]
            rows = [part.transpose(0, 1).flatten(1) for part in rows]
            if hidden.cls is not None:
                rows.append(attention_row(trace).float().transpose(0, 1).flatten(1))
            output = output_of(self.vit, trace.tokens).float()
            output = output @ projection.T if self.vit.head is None else output
            rows += [F.normalize(output, dim=-1), _fingerprint(images)]
            return torch.cat(rows, dim=1)

    def _targets(self, rows: Float[Tensor, "B row"]) -> Targets:
        parts = rows.split([int(np.prod(shape)) for shape in self._shapes], dim=1)
        tokens, register, attention, output, _ = (
            part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True)
        )
        return Targets(tokens, register, attention, output)

    def _open(self, number: int, projection: Tensor) -> np.memmap:
        """A file of the cache, a row for each view, with holes where nothing was computed."""
        if number not in self._files:
            config, folder = self._config, Path(self._config.cache)
            state = {**self.vit.state_dict(), "projection": projection}
            settings = self.blocks, self._shapes, config.num_views, config.min_crop
            self._key = self._key or digest(self.vit.config, state)[:8] + f"-{zlib.crc32(repr(settings).encode()):08x}"
            shape = FILE_ROWS, sum(int(np.prod(part)) for part in self._shapes)
            path = folder / self._key / f"{number:05d}.f16"
            with writing(folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    check_room(folder, 2 * shape[0] * shape[1], f"the teacher's tokens of {FILE_ROWS} views")
                with path.open("ab") as file:  # several processes may do so
                    file.truncate(2 * shape[0] * shape[1])
            self._files[number] = np.memmap(path, np.float16, "r+", shape=shape)
        return self._files[number]


FILE_ROWS = 4096
"""Views in a file of the cache."""

FINGERPRINT = 4
"""Means of so many times so many parts of an image tell it from another."""


def _fingerprint(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B parts"]:
    return F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), FINGERPRINT).flatten(1)


def without_registers(tokens: Tokens) -> Float[Tensor, "*B T D"]:
    """The class token, where there is one, and the patches."""
    return dataclasses.replace(tokens, registers=tokens.registers[..., :0, :]).sequence()


def output_of(vit: VisionTransformer, tokens: Tokens) -> Float[Tensor, "B C"]:
    """What the head says, or without one the pooled feature."""
    pooled = vit.pool(tokens)
    return pooled if vit.head is None else vit.head(pooled)


def attention_row(trace: Trace) -> Float[Tensor, "L B K"]:
    """The class token's attention, mean of the heads: to itself, to all registers together if any, to the patches."""
    rows = trace.attention
    assert rows is not None
    assert rows.to_cls is not None
    parts = [rows.to_cls.mean(2)]
    if rows.to_registers.shape[-1]:
        parts.append(rows.to_registers.mean(2).sum(-1))
    return torch.cat((*parts, rows.to_patches.mean(2).flatten(2)), dim=-1)
