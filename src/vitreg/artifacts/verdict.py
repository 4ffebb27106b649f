"""A diagnosis in plain sentences: which block, which norm, how many, what it means, what to do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitreg.artifacts.diagnosis import Diagnosis
from vitreg.artifacts.measures import say_ranges
from vitreg.checkpoints import registry
from vitreg.common.words import counted, number, percent

FEW_IMAGES = 4
"""Below this, position-fixed and content-dependent outliers cannot be told apart."""

SIMILAR = 0.1
"""Less is not called redundancy: outliers that follow from position alone had 0.05 and 0.09 more on 20 photographs."""

ENOUGH_OUTLIERS = 50
"""With fewer, a mean cosine of outliers is that of a few photographs."""


def position_kind(frequency: NDArray[np.float64], num_images: int) -> str | None:
    """Whether outliers sit at the same places in every image, or where the image has room for them.

    Position-fixed: at least half of all outliers lie at positions that are outliers in at least half of the images;
    content-dependent: less than a tenth do.
    """
    if num_images < FEW_IMAGES or not frequency.any():
        return None
    share = frequency[frequency >= 0.5].sum() / frequency.sum()
    return "position-fixed" if share >= 0.5 else "content-dependent" if share < 0.1 else "mixed"


def write_verdict(diagnosis: Diagnosis) -> tuple[str, ...]:
    """The findings as sentences, most important first."""
    if diagnosis.undecided is not None:
        sentences = [cannot_tell(diagnosis)]
    else:
        sentences = _outliers(diagnosis) if diagnosis.has_artifacts else _clean(diagnosis)
    sentences += _registers(diagnosis)
    if diagnosis.ranges is not None:
        sentences += say_ranges(diagnosis.ranges)
    if diagnosis.status == "artifacts":
        sentences.append(write_advice(diagnosis))
    if observed := diagnosis.model.get("observed"):
        sentences.append(observed["assumed"])
    return tuple(sentences + interrupted(diagnosis))


def interrupted(d: Diagnosis) -> list[str]:
    """That there could have been more images."""
    return [f"The run was interrupted: all this is from {counted(d.num_images, 'image')}."] if d.interrupted else []


def cannot_tell(d: Diagnosis) -> str:
    """Why a diagnosis is undecided, and what would decide it."""
    assert d.undecided is not None
    num = d.undecided.num_patches
    return (
        f"Whether {d.model['name']} has artifacts cannot be told from {counted(d.num_images, 'image')}: after block "
        f"{d.undecided.block}, {counted(num, 'patch')} {'has a norm' if num == 1 else 'have norms'} of "
        f"{number(d.undecided.ratio)} times the median, which is too little to go by; give at least "
        f"{counted(d.undecided.num_images_needed, 'image')}."
    )


def _outliers(d: Diagnosis) -> list[str]:
    block, last = d.blocks[d.block], len(d.blocks) - 1
    if not block.outlier_fraction:
        inside = ", ".join(str(b.block) for b in d.blocks if b.outlier_fraction)
        return [
            f"After block {d.block}, the one that was asked for, no patch is an outlier; after block {inside} some are."
        ]
    per_image = block.outlier_fraction * d.num_patches / d.num_images
    where = f"the last block ({last})" if d.block == last else f"block {d.block}"
    found = "artifacts" if d.status == "artifacts" else f"outliers by the rule that was asked for ({d.threshold_rule})"
    sentences = [
        f"{d.model['name']} has {found}: after {where}, {percent(block.outlier_fraction)} of the patches "
        f"({per_image:.1f} per image) have a norm of {number(block.threshold or 0)} or more, up to "
        f"{number(block.max)}; the median is {number(block.median)}."
    ]
    final = d.blocks[last]
    if not final.outlier_fraction:
        sentences.append(
            f"At the output they are invisible: after the last block the largest norm is {number(final.max)}, the "
            f"median {number(final.median)}. They matter where intermediate blocks are read."
        )
    sentences.append(
        f"They appear in block {d.onset_block}. Norms are taken after each block and before the final LayerNorm, "
        f"which would hide them."
    )
    sentences += _places(d)
    after = [b for b in d.blocks if b.block > (d.onset_block or 0) and b.attention_on_outliers is not None]
    if after:
        worst = max(after, key=lambda b: b.attention_on_outliers or 0.0)
        share = worst.attention_on_outliers or 0.0
        sentences.append(
            f"{percent(share)} of the class token's attention in block {worst.block} goes to these outliers"
            + (": attention maps show them rather than the objects." if share > 0.1 else ".")
        )
    if d.channels and d.channels[0][1] >= 0.2:
        leading = [f"{channel} ({percent(share)})" for channel, share in d.channels if share >= 0.1]
        sentences.append(f"Their norm sits in few channels: {', '.join(leading)} of {d.model['embed_dim']}.")
    return sentences


def _places(d: Diagnosis) -> list[str]:
    sentences = []
    if d.position_kind == "position-fixed":
        rows, columns = np.nonzero(d.position_frequency >= 0.5)
        places = ", ".join(f"({r}, {c})" for r, c in list(zip(rows, columns, strict=True))[:6])
        sentences.append(
            f"They are position-fixed: {len(rows)} positions, (row, column) {places}"
            f"{', ...' if len(rows) > 6 else ''}, are outliers in at least half of the images."
        )
    elif d.position_kind is not None:
        sentences.append(
            f"They are {d.position_kind}: the most frequent position is an outlier in "
            f"{percent(float(d.position_frequency.max()))} of the images."
        )
    near, far = d.neighbour_similarity.outliers, d.neighbour_similarity.others
    if near is not None and far is not None:
        num_outliers = round(d.outlier_fraction * d.num_patches)
        if near - far < SIMILAR:
            meaning = "they are no more redundant than the rest" if near <= far else "too little to call them redundant"
        else:
            meaning = "they are redundant patches" if num_outliers >= ENOUGH_OUTLIERS else "too few patches to tell by"
        sentences.append(
            f"Right after patch embedding, outliers have a mean cosine of {near:.2f} with their neighbors, other "
            f"patches {far:.2f}: {meaning}."
        )
    return sentences


def _clean(d: Diagnosis) -> list[str]:
    last = d.blocks[-1]
    worst = max(d.blocks, key=lambda b: b.max / b.median if b.median else 0.0)
    name, blocks = d.model["name"], f"its {len(d.blocks)} blocks"
    if d.threshold_rule.startswith("automatic"):
        split = f"in none of {blocks} do the norms of the patches split into two modes"
        found = f"No artifacts in {name}: {split} ({d.threshold_rule})."
    else:
        asked = f"the threshold that was asked for ({d.threshold_rule})"
        found = f"No patch of {name} reaches {asked} after any of {blocks}."
    excess = (
        f"After the last block the median norm is {number(last.median)} and the largest {number(last.max)}; the "
        f"largest excess, {worst.max / worst.median if worst.median else 0:.1f} times the median, is in block "
        f"{worst.block}"
    )
    if d.status == "long tail":
        excess += ": a long tail or a few patches, no mode of their own; look at them before calling the model clean"
    return [found, excess + "."]


def summary_and_registers(d: Diagnosis, block: int) -> list[tuple[str, NDArray[np.float64]]]:
    """Mean norms after a block by what they are of: DeiT's distillation token is read by the head, and no register."""
    assert d.register_norms is not None
    summary, registers = np.split(d.register_norms[block], [d.model.get("num_summary_tokens", 0)])
    return [(kind, norms) for kind, norms in (("summary token", summary), ("register", registers)) if len(norms)]


def _registers(d: Diagnosis) -> list[str]:
    if d.register_norms is None:
        return []
    block = d.blocks[d.block]
    of = [
        f"its {counted(len(norms), kind)} {'have' if len(norms) > 1 else 'has'} a mean norm of "
        f"{', '.join(number(float(n)) for n in norms)}"
        for kind, norms in summary_and_registers(d, d.block)
    ]
    text = f"After block {d.block} {' and '.join(of)}, against {number(block.median)} for the median patch"
    if block.attention_on_registers is not None:
        text += (
            f"; {percent(block.attention_on_registers)} of the class token's attention goes to them, which a map "
            f"over the patches does not show"
        )
    return [text + "."]


def write_advice(d: Diagnosis) -> str:
    """What to do about the artifacts that were found."""
    row = registry.find(d.model["name"])
    with_registers = row and (registry.find(f"{row.name}_reg") or registry.find(f"{row.name}_reg4"))
    trained = (
        f"use {with_registers.name}, the same model trained with registers"
        if with_registers
        else "use a checkpoint trained with registers (`vitreg models --filter reg4`)"
    )
    moved = ", or move the artifacts into a register without training (`vitreg fix`)"
    if d.model.get("observed"):
        moved = "; `vitreg fix` moves the artifacts of models that are converted, which this one is not"
    return (
        "For classification from the class token they do no known harm. For attention maps, object discovery, "
        f"segmentation or depth, {trained}{moved}."
    )
