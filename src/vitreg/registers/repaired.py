"""Singular defects: the direction that a block's weights give artifacts, and weights that write them no more."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vitreg.artifacts import REMOVED, diagnose
from vitreg.checkpoints import from_module
from vitreg.checkpoints.state import build
from vitreg.common.progress import OnProgress
from vitreg.common.words import counted, percent
from vitreg.images import Images
from vitreg.model import Block, VisionTransformer
from vitreg.registers.held_back import HeldBack, hold_back, outlier_limit
from vitreg.registers.insertion import MIN_SIMILARITY, destroyed, unchanged

INPUTS_PER_CHANNEL = 8
"""Gaussian inputs to which an MLP is fitted."""

NUM_BLOCKS, RATE, MOMENTUM, TEMPERATURE = 10, 5e-3, 0.9, 0.1
"""The reference's: blocks that are changed, up to the defective one; of gradient descent; of the neighbors' weights."""

QUIET = 10
"""So many batches without a defective patch, and the held-back images are asked."""

GAUSSIAN = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])


@dataclass(frozen=True)
class SingularDefect:
    """What a block does to every token if it is taken for linear.

    Attributes:
        direction: of length 1, that in which the block writes most, its leading left singular vector.
        accumulated: the same of all blocks up to this one.
        ratio: the block's first singular value over its second.
    """

    direction: Float[Tensor, " D"]
    accumulated: Float[Tensor, " D"]
    ratio: float


@torch.no_grad()
def singular_defects(vit: VisionTransformer, *, seed: int = 0) -> list[SingularDefect]:
    """The direction of artifacts after every block, from the weights alone.

    SINDER (arXiv 2407.16826), section 3: attention passes a token's value on, the norms only center and scale, and the
    hidden units are the least-squares fit to Gaussian inputs. For plain and gated MLPs, with and without LayerScale.

    Raises:
        ValueError: a model whose norms follow the branches, or with test-time registers.
    """
    config = vit.config
    if config.post_norm or config.register_neurons:
        has = "norms that follow its branches" if config.post_norm else "test-time registers"
        raise ValueError(f"{config.name or 'the model'} has {has}; its blocks cannot be taken for linear")
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(INPUTS_PER_CHANNEL * config.embed_dim, config.embed_dim, generator=generator)
    total, found = torch.eye(config.embed_dim), []
    for block in vit.blocks:
        assert isinstance(block, Block)
        own = _linear(block, inputs.to(vit.patch_embed.weight), centered=not config.rms_norm).float().cpu()
        total = own @ total
        left, values, _ = torch.linalg.svd(own)
        accumulated = torch.linalg.svd(total)[0][:, 0]
        found.append(SingularDefect(left[:, 0], accumulated, float(values[0] / values[1])))
    return found


def _linear(block: Block, inputs: Float[Tensor, "n D"], *, centered: bool) -> Float[Tensor, "D D"]:
    """A block as a matrix."""
    dim = inputs.shape[1]
    same = torch.eye(dim).to(inputs)
    center = same - 1 / dim if centered else same
    hidden: dict[str, Tensor] = {}
    block.mlp(inputs.unsqueeze(0), hidden.__setitem__)
    fit = torch.linalg.lstsq(inputs.float(), hidden["activations"][0].float()).solution.mT.to(inputs)
    attention = block.attn.proj.weight @ block.attn.qkv.weight.chunk(3)[2] @ (block.norm1.weight[:, None] * center)
    norm2 = block.norm1 if block.norm2 is None else block.norm2
    mlp = block.mlp.fc2.weight @ fit @ (norm2.weight[:, None] * center)
    if block.ls1 is not None:
        scale = block.ls1 if block.ls2 is None else block.ls2
        attention, mlp = block.ls1[:, None] * attention, scale[:, None] * mlp
    return same + attention + mlp if block.parallel else (same + mlp) @ (same + attention)


def repair_singular_defects(
    vit: VisionTransformer | nn.Module,
    images: Images,
    *,
    max_steps: int = 300,
    min_similarity: float = MIN_SIMILARITY,
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
) -> VisionTransformer:
    """A copy of a model whose weights were changed until they write no artifacts; no register is added.

    SINDER (arXiv 2407.16826): after the first block that has defective patches, these are drawn to the mean of their
    neighbors, by changing singular values of the linear layers alone (those of queries and keys are kept) in this block
    and the nine before. Here patches are defective by their norms, as `diagnose` finds them, because the direction does
    not point them out in every model; patches at the border count, and defective ones are no neighbors. It ends when
    held-back images have no outliers left.

    Nothing holds the other tokens: a model whose class token reads its artifacts loses that (`docs/registers.md`).

    Args:
        vit: the model, as for `diagnose`.
        images: at least 10, better 100, as for `diagnose`; gone through several times.
        max_steps: of gradient descent, a batch each.
        min_similarity: mean cosine of the pooled features with the original's below which the repair is refused.
        batch_size: images at a time.
        on_progress: called with the number of steps done and the most there can be.

    Returns:
        The model with other weights. Where there is nothing to repair, more than half of the outliers stay, or what
        the model is used for is lost, a copy, whose last of `config.changes` says so.

    Raises:
        ValueError: as of `singular_defects` and `diagnose`, or images that can be gone through only once.
    """
    vit = from_module(vit)
    defects = singular_defects(vit)

    batches, rest = hold_back(vit, images, batch_size)
    diagnosis = diagnose(vit, batches, max_examples=0)
    if diagnosis.onset_block is None:
        return unchanged(vit, f"Nothing was repaired. {diagnosis.verdict[0]}")
    held_back = HeldBack(vit, diagnosis, rest)
    limits = [outlier_limit(block) for block in diagnosis.blocks]
    repaired, shifts = _with_shifts(vit)
    optimizer = torch.optim.SGD([shift.values for of_block in shifts for shift in of_block], RATE, MOMENTUM)
    step = quiet = 0
    effect, along = held_back.effect(vit), 0.0
    while step < max_steps and effect.outliers > REMOVED:
        for batch, _ in batches:
            worst = _first_defective(repaired, batch, limits)
            quiet = 0 if worst else quiet + 1
            if worst:
                block, patches, defective = worst
                loss, aligned = _neighbor_loss(patches, defective, defects[block].direction.to(patches))
                along = along or aligned
                optimizer.zero_grad()
                if loss.isfinite():  # not where no defective patch has a sound neighbor
                    loss.backward()
                for of_block in shifts[: max(0, block - NUM_BLOCKS + 1)]:
                    for shift in of_block:
                        shift.values.grad = None
                optimizer.step()
            step += 1
            if on_progress is not None:
                on_progress(step, max_steps)
            if quiet >= QUIET or step >= max_steps:
                break
        effect, quiet = held_back.effect(repaired), 0
    onset = diagnosis.onset_block
    if not effect.outliers <= held_back.original / 2:  # NaN, too
        return unchanged(
            vit,
            f"Nothing was repaired. After {counted(step, 'step')} {percent(effect.outliers)} of outliers are left in "
            f"held-back images ({percent(held_back.original)} before); give more images or steps, or another method.",
        )
    if effect.similarity < min_similarity:
        return unchanged(vit, f"Nothing was repaired. {destroyed(effect.similarity, min_similarity)}")
    said = (
        f"Singular values of {counted(onset + 1, 'block')} were changed in {counted(step, 'step')}: the first one of "
        f"block {onset} was {defects[onset].ratio:.1f} times the second, and its direction has a cosine of {along:.2f} "
        f"with the artifacts. In {counted(held_back.num_images, 'image')} that were held back "
        f"{percent(effect.outliers)} of outliers are left ({percent(held_back.original)} before); mean cosine of the "
        f"pooled features {effect.similarity:.3f}."
    )
    return _folded(repaired, vit, said)


class _Shift(nn.Module):
    """Changes singular values of a matrix, as a parametrization of it; its first rows stay."""

    left: Tensor
    right: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], kept: int) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(weight[kept:].float(), full_matrices=False)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.values, self.kept = nn.Parameter(torch.zeros_like(values)), kept

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + F.pad((self.left * self.values) @ self.right, (0, 0, self.kept, 0)).to(weight)


def _with_shifts(vit: VisionTransformer) -> tuple[VisionTransformer, list[list[_Shift]]]:
    """A frozen copy whose linear layers have shifts of their singular values, and these, block by block."""
    changed, shifts = copy.deepcopy(vit).eval().requires_grad_(False), []
    for block in changed.blocks:
        assert isinstance(block, Block)
        dim = vit.config.embed_dim
        layers = ((block.attn.qkv, 2 * dim), (block.attn.proj, 0), (block.mlp.fc1, 0), (block.mlp.fc2, 0))
        shifts.append([_Shift(layer.weight, kept) for layer, kept in layers])
        for (layer, _), shift in zip(layers, shifts[-1], strict=True):
            parametrize.register_parametrization(layer, "weight", shift)
    return changed, shifts


def _folded(repaired: VisionTransformer, vit: VisionTransformer, said: str) -> VisionTransformer:
    """A plain model with the weights that the shifts make."""
    state = {}
    for name in vit.state_dict():
        owner, _, leaf = name.rpartition(".")
        state[name] = getattr(repaired.get_submodule(owner), leaf).detach()
    config = dataclasses.replace(
        vit.config,
        name=f"{vit.config.name or vit.config.architecture} + repaired weights",
        changes=(*vit.config.changes, said),
    )
    return build(config, state, "the repaired model").to(vit.patch_embed.weight.device)


def _first_defective(
    vit: VisionTransformer, batch: Float[Tensor, "B 3 H W"], limits: list[float]
) -> tuple[int, Float[Tensor, "B h w D"], Bool[Tensor, "B h w"]] | None:
    """The first block after which patches are defective, its patches, and which these are."""
    trace = vit.trace(batch, patches=True)
    assert trace.patches is not None
    for block, limit in enumerate(limits):
        defective = trace.patch_norms[block] >= limit
        if defective.any():
            return block, trace.patches[block].unflatten(1, trace.tokens.grid), defective
    return None


def _neighbor_loss(
    patches: Float[Tensor, "B h w D"], defective: Bool[Tensor, "B h w"], direction: Float[Tensor, " D"]
) -> tuple[Float[Tensor, ""], float]:
    """How far defective patches are from the mean of their sound neighbors, and how far along the direction.

    Neighbors weigh more the less they are along the direction themselves.
    """
    with torch.no_grad():
        cosine = (F.normalize(patches, dim=-1) @ direction).abs()
        weights = ((-cosine / TEMPERATURE).exp() * ~defective).unsqueeze(1)
        kernel = GAUSSIAN.to(patches)[None, None]
        sums = F.conv2d(
            (patches.permute(3, 0, 1, 2) * weights.squeeze(1)).flatten(0, 1).unsqueeze(1), kernel, padding=1
        )
        total = F.conv2d(weights, kernel, padding=1).squeeze(1)
        means = sums.view(-1, *total.shape).permute(1, 2, 3, 0) / total.clamp_min(1e-12).unsqueeze(-1)
        reached = defective & (total > 1e-9)
        typical = patches[~defective].norm(dim=-1).mean()
    return (patches[reached] - means[reached]).norm(dim=-1).mean() / typical, float(cosine[defective].mean())
