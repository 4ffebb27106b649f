"""The losses of DINOv2, and what turns a teacher's outputs into targets.

Every process holds an equal number of images, a contiguous part of the global batch. The mean of a loss over the
processes is the loss of the global batch, and the mean of the gradients, which DDP and FSDP take, is its gradient.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

CENTER_MOMENTUM = 0.9
SINKHORN_ITERATIONS = 3


class SinkhornKnopp(nn.Module):
    """Targets in which all prototypes are used equally often (SwAV, arXiv 2006.09882; DINOv2, section 4).

    Three rounds of Sinkhorn-Knopp on `exp(cosines / temperature)` over the global batch. The matrix stays as it is, and
    a factor for each row and column is updated, which takes one pass over memory instead of four.
    """

    @torch.no_grad()
    def forward(self, cosines: Float[Tensor, "M K"], temperature: float) -> Float[Tensor, "M K"]:
        """Rows that sum to 1.

        Args:
            cosines: this process's rows; their number may differ between processes, and be zero.
            temperature: not below 0.025, where the exponential of two opposite vectors leaves float32.
        """
        matrix = ((cosines - 1) / temperature).exp_()  # cosines are at most 1: no overflow
        rows, columns = (matrix.new_ones(size) for size in matrix.shape)
        for _ in range(SINKHORN_ITERATIONS):
            columns = _sum_over_processes(rows @ matrix).reciprocal_()
            rows = (matrix @ columns).reciprocal_()
        return matrix.mul_(columns).mul_(rows.unsqueeze(1))


class MeanCentering(nn.Module):
    """Targets from outputs less their running mean (DINO, arXiv 2104.14294, section 3.1)."""

    center: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, cosines: Float[Tensor, "M K"], temperature: float) -> Float[Tensor, "M K"]:
        """The softmax by the center so far, which then moves towards these rows of all processes."""
        targets = F.softmax((cosines - self.center) / temperature, dim=-1)
        total = _sum_over_processes(cosines.sum(0))
        count = _sum_over_processes(total.new_full((), len(cosines)))
        # A batch without hidden patches has no mean and leaves the center where it is.
        mean = torch.where(count > 0, total / count, self.center)
        self.center.lerp_(mean, 1 - CENTER_MOMENTUM)
        return targets


def dino_loss(
    student: Float[Tensor, "B V K"], targets: Float[Tensor, "B 2 K"], temperature: float
) -> Float[Tensor, ""]:
    """The loss of DINO: the mean cross-entropy over all pairs of a teacher's view and another view of the same image.

    Args:
        student: cosines of the class tokens; the first two views are those that the teacher saw.
        targets: of the two views that the teacher saw.
        temperature: of the student.
    """
    num_images, num_views, num_prototypes = student.shape
    both = targets.sum(1, keepdim=True).expand(-1, num_views - 2, -1)
    wanted = torch.cat([targets.flip(1), both], dim=1)
    total = F.cross_entropy(
        student.reshape(-1, num_prototypes) / temperature, wanted.reshape(-1, num_prototypes), reduction="sum"
    )
    return total / (num_images * 2 * (num_views - 1))


def ibot_loss(
    student: Float[Tensor, "M K"], targets: Float[Tensor, "M K"], weights: Float[Tensor, " M"], temperature: float
) -> Float[Tensor, ""]:
    """The loss of iBOT (arXiv 2111.07832): the mean over a crop's hidden patches, then over crops.

    Crops in which nothing is hidden count as zeros, in DINOv2 (`dinov2/loss/ibot_patch_loss.py: forward_masked`) as in
    lightly: hiding patches in half of the crops halves the loss.

    Args:
        student: cosines of the hidden patches, crop after crop.
        targets: the teacher's, which saw them.
        weights: of the hidden patches, one over their number in the crop and over the number of crops.
        temperature: of the student.
    """
    return (F.cross_entropy(student / temperature, targets, reduction="none") * weights).sum()


def gather_features(features: Float[Tensor, "B D"]) -> Float[Tensor, "G D"]:
    """The features of all processes, whose gradients go back to them and are summed.

    What all of them compute from the whole is then, averaged over the processes, as if one had computed it.
    """
    return torch.cat(all_gather(features.contiguous())) if dist.is_initialized() else features


def entropies(targets: Float[Tensor, "M K"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(mean entropy of a target, entropy of the mean target of the global batch), as shares of the largest, log K.

    Their difference is how much a target tells of its image. It is 0 in both kinds of collapse: where all images
    get the same prototype, both are 0; where every target is uniform, both are 1. Training goes well while the second
    stays near 1 and the first far below it. SinkhornKnopp keeps the second high whatever happens, so that there a
    collapse shows in the first, which rises to 1.
    """
    largest = math.log(targets.shape[1])
    mean = _sum_over_processes(targets.mean(0))
    mean = mean / mean.sum()
    return torch.special.entr(targets).sum(1).mean() / largest, torch.special.entr(mean).sum() / largest


def _sum_over_processes(value: Tensor) -> Tensor:
    """In place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
