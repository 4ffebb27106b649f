"""The pass over shards: each is a file, written under another name while the next is computed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.artifacts import LogAxis, NormStatistics, write_advice
from vitreg.common.modes import evaluating
from vitreg.common.progress import OnProgress
from vitreg.images import (
    ImageBatch,
    ImageError,
    ImageStream,
    Shards,
    SkippedImage,
    spaced_indices,
)
from vitreg.model import Trace, VisionTransformer
from vitreg.probes.store.diagnosis import diagnose_shards
from vitreg.probes.store.manifest import Manifest
from vitreg.probes.store.origin import Origin
from vitreg.probes.store.shards import (
    FOLDER,
    FORMAT,
    RowGroup,
    Shard,
    ShardWriter,
    open_shard,
    shard_name,
    shard_schema,
)

_ROW_GROUP_BYTES = 8 * 2**20


class ShardPass:
    """The shards that are missing."""

    def __init__(
        self,
        vit: VisionTransformer,
        shards: Shards,
        folder: Path,
        manifest: Manifest,
        strict: bool,
        on_progress: OnProgress | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self._vit, self._shards, self._images, self._folder = vit, shards, shards.images, folder
        self._origin, self._config = manifest.origin, manifest.origin.config
        self._preprocess = manifest.origin.preprocess
        height, width = (side // vit.config.patch_size for side in self._preprocess.size)
        self._grid, self._axis, self.device = (height, width), LogAxis(), next(vit.parameters()).device
        self._patch_blocks = frozenset(self._config.patch_blocks or ())
        self._shapes = self._config.shapes(vit.config, self._grid)
        self._schema = shard_schema(self._config, self._shapes)
        self._note = {
            "format": FORMAT,
            "version": metadata.version("vitreg"),
            "model": dataclasses.asdict(self._origin.model) | {"changes": list(vit.config.changes)},
            "preprocess": dataclasses.asdict(self._preprocess),
            "config": dataclasses.asdict(self._config),
            "grid": self._grid,
            "shapes": self._shapes,
        }
        self._manifest, self._strict, self._on_progress, self._say = manifest, strict, on_progress, say
        count, num_images = self._config.patches, shards.num_images
        if count and num_images is None:
            raise ValueError(f"patches is {count}, but how many images {self._images.source} holds is known last")
        self._with_patches = None if count is None else frozenset(spaced_indices(num_images or 0, count).tolist())
        self._absent = shards.absent()
        self._done = self._num_skipped = 0

    def run(self, batch_size: int, indices: Iterable[int]) -> None:
        """Compute and write them, in order; batches end where a shard does, so that they are the same after a kill."""
        missing: list[int] = []
        for index in indices:
            path = self._path(index)
            if path.exists():
                shard = open_shard(path)
                self._done += shard.num_rows
                self.warn(shard)
            else:
                missing.append(index)
        stream = ImageStream(
            self._images,
            self._preprocess,
            numbers=(number for index in missing for number in self._shards.numbers(index)),
            batch_size=batch_size,
            device=self.device,
        )
        if self._done:
            self._advance(0, stream.skipped)
        # A file is written while the next images are computed: half of the time is waiting for the disk.
        with (
            evaluating(self._vit),
            ThreadPoolExecutor(1) as thread,
            closing(stream.parts(self._shards.stride)) as parts,
        ):
            behind = _Behind(thread)
            for index, batches in parts:
                self._write(index, batches, stream.skipped, behind)
            behind.wait()

    def _path(self, index: int) -> Path:
        return shard_path(self._folder, index, self._origin, self._shards)

    def warn(self, shard: Shard) -> None:
        """Say what the first shard with norms shows."""
        if self._say is None or (found := diagnose_shards([shard], self._manifest)) is None:
            return
        if found.has_artifacts:
            self._say(f"{found.verdict[0]} {write_advice(found)} (from the first {found.num_images} images)")
        self._say = None

    def _write(self, index: int, batches: Iterable[ImageBatch], skipped: list[SkippedImage], behind: _Behind) -> None:
        """One shard: a row for every image, in order."""
        path, content = self._path(index), self._shards.digest(index)
        note = self._note | {"digest": self._origin.shard_digest(content), "content": content, "index": index}
        statistics = NormStatistics(self._vit.config.depth, self._grid, self._axis, self.device)
        writer, rows, next_skipped = ShardWriter(path, self._schema, note), RowGroup(), len(skipped)
        try:
            for batch in batches:
                next_skipped = self._add_rows(rows, batch, skipped, next_skipped)
                rows.add_tensors(self._features(batch, statistics))
                self._advance(len(batch.numbers), skipped)
                if rows.num_bytes >= _ROW_GROUP_BYTES:
                    behind.do(writer.write, rows)
                    rows = RowGroup()
            self._add_rows(rows, None, skipped, next_skipped)
            self._advance(0, skipped)
            if rows.ids:
                behind.do(writer.write, rows)
            norms = statistics.state(self._config.norm_blocks or ()) if statistics.num_images else None
            behind.do(self._close, writer, norms, path)
        except BaseException as error:
            behind.abandon(writer, error)
            raise

    def _close(self, writer: ShardWriter, norms: dict[str, Tensor] | None, path: Path) -> None:
        writer.finish(norms)
        if self._say is not None:
            self.warn(open_shard(path))

    def _add_rows(
        self, rows: RowGroup, batch: ImageBatch | None, skipped: list[SkippedImage], next_skipped: int
    ) -> int:
        """The images of a batch and, where they belong, those before its last that could not be read; or all of these.

        Returns:
            How many of `skipped` have a row.
        """
        sizes = {} if batch is None else dict(zip(batch.numbers, batch.sizes, strict=True))
        end = max(sizes, default=None)
        failed = {one.number: one for one in skipped[next_skipped:] if end is None or one.number < end}
        for number in sorted([*sizes, *failed]):
            id, label = self._images.id(number), self._images.label(number)
            if number in failed:
                rows.add(id, label=label, error=failed[number].reason)
                continue
            if self._with_patches is None or number in self._with_patches:
                rows.patch_rows.append(len(rows.ids))
            rows.add(id, size=sizes[number], label=label)
        return next_skipped + len(failed)

    def _advance(self, count: int, skipped: list[SkippedImage]) -> None:
        """Count images that are done, and those that could not be read since.

        Damaged images are left out; one that is lost on the way ends the pass, which goes on when it is back.
        """
        for image in skipped[self._num_skipped :]:
            file = self._images.file(image.number)
            if image.number not in self._absent and not os.path.exists(file):
                raise ValueError(f"{file} was there when the pass began and is gone; restore it and run the pass again")
            if self._strict:
                raise ImageError(image.reason)
        self._done += count + len(skipped) - self._num_skipped
        self._num_skipped = len(skipped)
        if self._on_progress is not None:
            self._on_progress(self._done, self._shards.num_images)

    @torch.inference_mode()
    def _features(self, batch: ImageBatch, statistics: NormStatistics) -> dict[str, Tensor]:
        """What is kept of a batch, on the CPU; the one forward pass."""
        trace = self._vit.trace(batch.images, blocks=self._config.blocks, hidden=True)
        assert trace.hidden is not None
        rows = [i for i, n in enumerate(batch.numbers) if self._with_patches is None or n in self._with_patches]
        found: dict[str, Tensor] = {}
        if "pooled" in self._shapes:
            found["pooled"] = self._vit.pool(trace.tokens)
        if "norms" in self._shapes:
            found["norms"] = trace.patch_norms[list(self._config.norm_blocks or ())].movedim(0, 1)[rows].contiguous()
        for i, block in enumerate(self._config.blocks):
            name = {kind: self._config.column(kind, block) for kind in ("cls", "mean", "registers", "patches")}
            if name["cls"] in self._shapes and trace.hidden.cls is not None:
                found[name["cls"]] = self._normed(trace.hidden.cls[i])
            if name["registers"] in self._shapes:
                found[name["registers"]] = self._normed(trace.hidden.registers[i][rows])
            if not {name["mean"], name["patches"]} & {*self._shapes}:
                continue
            patches = self._normed(trace.hidden.patches[i])
            if name["mean"] in self._shapes:
                found[name["mean"]] = patches.mean(1, dtype=torch.float32)
            if name["patches"] in self._shapes:
                found[name["patches"]] = patches if len(rows) == len(patches) else patches[rows]
        for name, tensor in found.items():
            found[name] = tensor = tensor.to("cpu", getattr(torch, self._config.dtype_of(name)))
            of_all = len(tensor) == len(batch.numbers)
            self._check_finite(name, tensor, batch.numbers if of_all else [batch.numbers[row] for row in rows])
        if rows and self._config.patches != 0:
            statistics.update(trace if len(rows) == len(batch.numbers) else _rows_of(trace, rows))
        return found

    def _normed(self, tokens: Float[Tensor, "B *T D"]) -> Float[Tensor, "B *T D"]:
        return self._vit.norm(tokens) if self._config.normed else tokens

    def _check_finite(self, name: str, tensor: Tensor, numbers: Sequence[int]) -> None:
        if not tensor.numel():
            return
        # The largest magnitude is eight times as fast as asking every number.
        finite = tensor.flatten(1).abs().amax(1).isfinite()
        if not finite.all():
            number = numbers[int(finite.int().argmin())]
            raise ValueError(
                f"the model's tokens are not finite ({name.split('_')[0]}) for {self._images.name(number)}; "
                f"use a model in float32, and dtype float32 where float16 is too small"
            )


class _Behind:
    """One thing after the other in a thread, one of them waiting at most."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._last: Future[None] | None = None

    def do(self, function: Callable[..., None], *arguments: object) -> None:
        """Do it when what was asked for before is done; raises what that raised."""
        self.wait()
        self._last = self._thread.submit(function, *arguments)

    def wait(self) -> None:
        """Until nothing is left to do; raises what was raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def abandon(self, writer: ShardWriter, error: BaseException) -> None:
        """Leave nothing of a file, whatever is being written to it now."""
        with suppress(Exception):
            self.wait()
        writer.abandon(error)


def _rows_of(trace: Trace, rows: list[int]) -> Trace:
    """The norms of some images."""
    return dataclasses.replace(
        trace,
        patch_norms=trace.patch_norms[:, rows],
        cls_norms=None if trace.cls_norms is None else trace.cls_norms[:, rows],
        register_norms=trace.register_norms[:, rows],
    )


def shard_path(folder: Path, index: int, origin: Origin, shards: Shards) -> Path:
    """Where a shard is."""
    return folder / FOLDER / shard_name(index, origin.shard_digest(shards.digest(index)))
