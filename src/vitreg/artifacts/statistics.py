"""What a diagnosis adds up over batches, in memory that does not grow with the number of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vitreg.artifacts.histogram import BINS_PER_STEP, NUM_BINS, NUM_STEPS, LogAxis, add_counts
from vitreg.common.devices import summing_device
from vitreg.model import Trace


class NormStatistics:
    """Counts of norms, and sums of other quantities, per bin of the norm.

    Keeping every quantity against the norm of its token lets the threshold be chosen after the last image.

    Args:
        depth: blocks of the model.
        grid: rows and columns of patches; the same for all batches.
        axis: the bins.
        device: that of the traces.
        time_steps: grids of a video model, one below the other in `grid`.
    """

    def __init__(
        self, depth: int, grid: tuple[int, int], axis: LogAxis, device: torch.device, *, time_steps: int = 1
    ) -> None:
        self.axis, self.grid, self.depth, self.time_steps = axis, grid, depth, time_steps
        self.num_images = 0
        self._device = device = summing_device(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._counts = zeros(depth, NUM_BINS, dtype=torch.int64)
        self._per_position = zeros(depth * grid[0] * grid[1], NUM_STEPS, dtype=torch.int32)
        self._sum, self._sum_of_squares = zeros(depth), zeros(depth)
        self._max = zeros(depth)
        self._similarity = zeros(depth, NUM_BINS)
        self._attention = zeros(depth, NUM_BINS)
        self._attention_to_registers = zeros(depth)
        self._has_attention = self._has_similarity = False
        self._position_blocks = list(range(depth))
        self._token_norms: dict[str, Tensor] = {}

    @torch.inference_mode()
    def update(self, trace: Trace) -> None:
        """Add a batch. Of its trace counts what is there: `embeddings`, and attention that is asked `from="cls"` first.

        Raises:
            ValueError: the model produced norms that are not finite.
        """
        norms = trace.patch_norms.flatten(2).to(self._device)  # [L, B, N]
        if not torch.isfinite(norms).all():
            first = int((~torch.isfinite(norms)).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"the tokens are not finite after block {first} (dtype {trace.tokens.patches.dtype}); "
                f"use bfloat16 or float32, whose range does not overflow"
            )
        self.num_images += norms.shape[1]
        bins = self.axis.bins(norms)
        rows = torch.arange(self.depth, device=norms.device)[:, None, None].expand_as(bins)
        add_counts(self._counts, rows, bins)
        positions = rows * norms.shape[2] + torch.arange(norms.shape[2], device=norms.device)
        add_counts(self._per_position, positions, bins // BINS_PER_STEP)
        self._sum += norms.double().sum((1, 2))
        self._sum_of_squares += norms.double().square().sum((1, 2))
        self._max = torch.maximum(self._max, norms.amax((1, 2)).double())
        if trace.embeddings is not None:
            self._has_similarity = True
            each = trace.embeddings.unflatten(1, (self.time_steps, -1)).flatten(0, 1)  # two times are no neighbors
            grid = (self.grid[0] // self.time_steps, self.grid[1])
            similarity = neighbour_similarity(each, grid).to(self._device)
            add_counts(self._similarity, rows, bins, similarity.view(norms.shape[1:]).expand_as(norms))
        if trace.attention is not None and trace.attention.to_cls is not None:
            self._add_attention(trace, rows, bins)
        for name, values in (("registers", trace.register_norms), ("cls", trace.cls_norms)):
            if values is not None and values.numel():
                self._token_norms[name] = self._token_norms.get(name, 0) + values.to(self._device).double().sum(1)

    def _add_attention(self, trace: Trace, rows: Tensor, bins: Tensor) -> None:
        """What the class token pays to each norm. A block attends to what the block before it wrote."""
        assert trace.attention is not None
        self._has_attention = True
        to_patches = trace.attention.to_patches[:, :, :, 0].mean(2).flatten(2).to(self._device)  # [L, B, N]
        add_counts(self._attention, rows[1:], bins[:-1], to_patches[1:])
        # Block 0 attends to embeddings, which have no outliers yet: count all of it as the lowest norm.
        self._attention[0, 0] += to_patches[0].sum()
        to_registers = trace.attention.to_registers[:, :, :, 0].sum(-1).mean(2).sum(1)
        self._attention_to_registers += to_registers.to(self._device).double()

    def state(self, position_blocks: Sequence[int]) -> dict[str, Tensor]:
        """What follows from norms, on the CPU, to be added to that of other images; positions of some blocks only."""
        sums = {
            "num_images": torch.tensor([self.num_images]),
            "counts": self._counts,
            "sums": torch.stack([self._sum, self._sum_of_squares, self._max]),
            "position_blocks": torch.tensor(position_blocks, dtype=torch.int64),
            "per_position": self._per_position.unflatten(0, (self.depth, -1))[list(position_blocks)],
        }
        sums |= {f"norms of {name}": total for name, total in self._token_norms.items()}
        return {name: value.cpu().contiguous() for name, value in sums.items()}

    @classmethod
    def added(cls, grid: tuple[int, int], axis: LogAxis, states: Iterable[Mapping[str, Tensor]]) -> NormStatistics:
        """The sum of what `state` gave of different images; at least one."""
        total: NormStatistics | None = None
        for state in states:
            if total is None:
                total = cls(len(state["counts"]), grid, axis, torch.device("cpu"))
                total._position_blocks = state["position_blocks"].tolist()
                total._per_position = total._per_position.long()
            total.num_images += int(state["num_images"])
            total._counts += state["counts"]
            sums, squares, largest = state["sums"]
            total._sum += sums
            total._sum_of_squares += squares
            total._max = torch.maximum(total._max, largest)
            total._per_position.view(total.depth, -1, NUM_STEPS)[total._position_blocks] += state["per_position"]
            for name in ("registers", "cls"):
                if (more := state.get(f"norms of {name}")) is not None:
                    total._token_norms[name] = total._token_norms.get(name, 0) + more
        assert total is not None
        return total

    def has_positions(self, block: int) -> bool:
        """Whether it is known where in the image the norms of a block are."""
        return block in self._position_blocks

    def counts(self) -> NDArray[np.int64]:
        """Patches per block and fine bin, `[L, NUM_BINS]`."""
        return self._counts.cpu().numpy()

    def num_above(self, block: int, step: int | None) -> int:
        """Patches of a block at or above a step of the axis; none where there is no step."""
        return 0 if step is None else int(self._counts[block, step * BINS_PER_STEP :].sum())

    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Mean, standard deviation and maximum of the norms of each block, `[L]` each."""
        total = self.num_images * self.grid[0] * self.grid[1]
        mean = self._sum / total
        variance = (self._sum_of_squares / total - mean.square()).clamp_min(0)
        return mean.cpu().numpy(), variance.sqrt().cpu().numpy(), self._max.cpu().numpy()

    def position_frequency(self, block: int, step: int | None) -> NDArray[np.float64]:
        """Share of the images in which each position is an outlier after a block, `[h, w]`; 0 where it was not kept."""
        if step is None or not self.has_positions(block):
            return np.zeros(self.grid)
        per_position = self._per_position.view(self.depth, *self.grid, NUM_STEPS)[block]
        return (per_position[..., step:].sum(-1).double() / self.num_images).cpu().numpy()

    def mean_similarity(self, block: int, step: int | None) -> tuple[float | None, float | None]:
        """Mean neighbor similarity of the outliers and of the other patches of a block, None where there are none."""
        if self.grid == (1, 1) or not self._has_similarity:
            return None, None
        split = NUM_BINS if step is None else step * BINS_PER_STEP
        sums, counts = self._similarity[block], self._counts[block]
        parts = ((sums[split:], counts[split:]), (sums[:split], counts[:split]))
        outliers, others = (float(s.sum() / n.sum()) if n.sum() else None for s, n in parts)
        return outliers, others

    def attention_on_outliers(self, block: int, step_before: int | None) -> float | None:
        """Share of the class token's attention in a block that lands on outliers of the block before it."""
        if not self._has_attention:
            return None
        if step_before is None:
            return 0.0
        return float(self._attention[block, step_before * BINS_PER_STEP :].sum() / self.num_images)

    def attention_on_registers(self, block: int) -> float | None:
        """Share of the class token's attention in a block that goes to the registers."""
        if not self._has_attention:
            return None
        return float(self._attention_to_registers[block] / self.num_images)

    def mean_token_norms(self, name: Literal["registers", "cls"]) -> NDArray[np.float64] | None:
        """Of each register `[L, R]`, or of the class token `[L]`; None where there is none."""
        total = self._token_norms.get(name)
        return None if total is None else (total / self.num_images).cpu().numpy()


def neighbour_similarity(embeddings: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B h w"]:
    """Mean cosine between a patch and its (up to four) neighbors.

    The redundancy test of the paper (section 2.1, Fig. 5a): taken right after the patch embedding, patches that will
    become artifacts are close to 1.
    """
    unit = F.normalize(embeddings.float(), dim=-1).unflatten(1, grid)
    total = unit.new_zeros(unit.shape[:3])
    neighbors = unit.new_zeros(grid)
    for near, far in (
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    ):
        cosine = torch.linalg.vecdot(unit[:, *near], unit[:, *far])
        for side in (near, far):
            total[:, *side] += cosine
            neighbors[*side] += 1
    return total / neighbors.clamp_min(1)
