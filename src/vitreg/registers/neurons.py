"""Which hidden units write the artifacts?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.artifacts import Diagnosis, diagnose
from vitreg.checkpoints import from_module
from vitreg.common.devices import summing_device
from vitreg.common.progress import OnProgress
from vitreg.images import Batches, Images
from vitreg.model import VisionTransformer
from vitreg.model.block import Block

CPU_ACTIVATIONS, GPU_ACTIVATIONS = 2**25, 2**28
"""Activations held at once: 128 MiB and 1 GiB in float32. On a CPU, more costs a fifth of the time, in page faults."""


@dataclass(frozen=True)
class RegisterNeuron:
    """A hidden unit of an MLP, and how it tells outliers from the other patches.

    Attributes:
        block: counted from 0.
        unit: counted from 0, in the order in which they enter `fc2`.
        on_outliers: mean activation on the outlier patches (of its magnitude, where units may be negative: in gated
            MLPs and those with a norm before `fc2`).
        elsewhere: the same on all other patches.
    """

    block: int
    unit: int
    on_outliers: float
    elsewhere: float


def find_register_neurons(
    vit: VisionTransformer | nn.Module,
    images: Images,
    *,
    most: int = 256,
    diagnosis: Diagnosis | None = None,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> list[RegisterNeuron]:
    """The hidden units that fire on outliers, in all blocks up to the one in which outliers appear.

    "Vision Transformers Don't Need Trained Registers" (Jiang et al., arXiv 2506.08010), Algorithm 1, with the outliers
    and the top layer from `diagnose` instead of given by hand. Ranked by how much more a unit adds to the residual
    stream of an outlier than to that of another patch: the difference of its mean activations times the norm of its
    column of `fc2` (and LayerScale), so that blocks of different scale can be compared.

    The images are gone through twice (once with a `diagnosis`), in memory that does not grow with their number.

    Args:
        vit: the model, as for `diagnose`.
        images: as for `diagnose`; an iterable must give the same images each time.
        most: units in the list.
        diagnosis: of the same model on the same images, if there is one already.
        batch_size: images at a time.
        on_progress: called with the number of images done and their total over both passes, where it is known.

    Returns:
        The units, those that write the artifacts first; none for a model without artifacts.

    Raises:
        ValueError: no images, or images that can be gone through only once.
    """
    vit = from_module(vit)
    device = next(vit.parameters()).device
    batches = Batches(images, vit.preprocess, batch_size=batch_size, device=device)
    if diagnosis is None:
        if not batches.repeatable:
            raise ValueError("images can be gone through only once, but are needed twice: give a list or a DataLoader")
        diagnosis = diagnose(vit, batches, max_examples=0, on_progress=on_progress)
    if diagnosis.onset_block is None or diagnosis.threshold is None:
        return []
    depth = diagnosis.onset_block + 1
    sums = Activations(depth, vit.config.mlp_dim, device)
    for batch, _ in batches:
        for part in batch.split(_images_at_once(vit, batch, depth)):
            sums.add(vit, part, diagnosis.block, diagnosis.threshold)
        if on_progress is not None:
            on_progress(diagnosis.num_images + sums.num_images, None if batches.total is None else 2 * batches.total)
    if not sums.num_outliers:
        return []
    outliers, others = sums.means()
    written = (outliers - others) * output_norms(vit)[:depth].to(outliers.device)
    best = written.flatten().topk(min(most, written.numel()))
    places = [
        divmod(i, vit.config.mlp_dim) for i, w in zip(best.indices.tolist(), best.values.tolist(), strict=True) if w > 0
    ]
    return [RegisterNeuron(b, u, float(outliers[b, u]), float(others[b, u])) for b, u in places]


class Activations:
    """Sums of the activations of every unit of the first blocks, on outliers and on all patches.

    Args:
        depth: how many blocks.
        mlp_dim: units in each.
        device: that of the model.
    """

    def __init__(self, depth: int, mlp_dim: int, device: torch.device) -> None:
        self._on_outliers = torch.zeros(depth, mlp_dim, dtype=torch.float64, device=summing_device(device))
        self._on_all = torch.zeros_like(self._on_outliers)
        self.num_outliers = self.num_patches = self.num_images = 0

    @torch.inference_mode()
    def add(self, vit: VisionTransformer, batch: Float[Tensor, "B 3 H W"], block: int, threshold: float) -> None:
        """Add a batch; outliers are the patches whose norm after `block` is at or above `threshold`."""
        trace = vit.trace(batch, blocks=range(len(self._on_all)), activations=True)
        assert trace.activations is not None
        outliers = (trace.patch_norms[block] >= threshold).flatten(1)
        for i, units in enumerate(trace.activations.patches.unbind(0)):
            if vit.config.signed_units:
                units = units.abs()
            # A product, because PyTorch sums over the leading axes of a view many times more slowly.
            ones = units.new_ones(len(units), 1, units.shape[1])
            self._on_all[i] += torch.bmm(ones, units).sum((0, 1)).to(self._on_all.device)
            self._on_outliers[i] += units[outliers].sum(0, dtype=torch.float32).to(self._on_all.device)
        self.num_outliers += int(outliers.sum())
        self.num_patches += outliers.numel()
        self.num_images += len(batch)

    def means(self) -> tuple[Float[Tensor, "blocks units"], Float[Tensor, "blocks units"]]:
        """On outliers, and on the other patches."""
        others = (self._on_all - self._on_outliers) / max(self.num_patches - self.num_outliers, 1)
        return self._on_outliers / self.num_outliers, others


def output_norms(vit: VisionTransformer) -> Float[Tensor, "depth units"]:
    """The norm of what each unit adds to the residual stream for an activation of 1."""
    norms = []
    for block in vit.blocks:
        assert isinstance(block, Block)
        columns = block.mlp.fc2.weight.detach().float()
        scale = block.ls1 if block.parallel else block.ls2
        norms.append((columns if scale is None else columns * scale.detach().float()[:, None]).norm(dim=0))
    return torch.stack(norms)


def _images_at_once(vit: VisionTransformer, batch: Tensor, depth: int) -> int:
    patches = batch.shape[-2] * batch.shape[-1] // vit.config.patch_size**2
    # Twice: while they are gathered, the activations exist block by block and together.
    budget = CPU_ACTIVATIONS if batch.device.type == "cpu" else GPU_ACTIVATIONS
    return max(1, budget // (2 * depth * (patches + vit.config.num_prefix_tokens) * vit.config.mlp_dim))
