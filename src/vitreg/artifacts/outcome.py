"""Did a change remove the artifacts? A comparison judged and put into sentences."""

from __future__ import annotations

from collections.abc import Sequence

from vitreg.artifacts.comparison import BlockChange, Comparison, Outcome
from vitreg.artifacts.diagnosis import Diagnosis
from vitreg.artifacts.measures import say_ranges_changed
from vitreg.artifacts.verdict import cannot_tell, interrupted, summary_and_registers
from vitreg.common.words import counted, number, percent

REMOVED = 1e-4
"""Share of outlier patches, in every block, up to which artifacts count as removed."""

PARTLY = 0.5
"""Artifacts are partly removed where at most this part of the outliers is left in the worst block."""


def judge(before: Diagnosis, after: Diagnosis, blocks: Sequence[BlockChange]) -> Outcome:
    """Removed: by the first model's thresholds at most 0.01 % are left in every block, and no new mode appeared."""
    if before.undecided is not None:
        return "cannot tell"
    if not before.has_artifacts:
        return "nothing to remove"
    left = max(block.outlier_fraction_after for block in blocks)
    if left <= REMOVED and not after.has_artifacts:
        return "removed" if after.undecided is None else "cannot tell"
    return "partly removed" if left <= PARTLY * max(b.outlier_fraction_before for b in blocks) else "not removed"


def write_comparison_verdict(comparison: Comparison) -> tuple[str, ...]:
    """The findings as sentences, most important first."""
    c = comparison
    sentences = _nothing(c) if not c.before.has_artifacts else _outliers(c)
    sentences += [cannot_tell(d) for d in (c.before, c.after) if d.undecided is not None]
    if c.outcome in ("partly removed", "not removed"):
        sentences += _why(c)
    sentences += _attention(c) + _registers(c) + _features(c)
    if c.before.ranges is not None and c.after.ranges is not None:
        sentences += say_ranges_changed(c.before.ranges, c.after.ranges)
    sentences += dict.fromkeys(d.model["observed"]["assumed"] for d in (c.before, c.after) if "observed" in d.model)
    return tuple(sentences + interrupted(c.before))


def _nothing(c: Comparison) -> list[str]:
    name = c.before.model["name"]
    if c.after.has_artifacts:
        has = "no artifacts to remove" if c.before.undecided is None else "none that these images prove"
        return [f"{name} has {has}, but the second model has: {c.after.verdict[0]}"]
    if c.before.undecided is not None:
        return []
    if c.after.undecided:
        return [f"{name} has no artifacts to remove."]
    return ["Neither of the two models has artifacts."] + ["The two models are the same."] * c.same_model


def _outliers(c: Comparison) -> list[str]:
    block = c.blocks[c.before.block]
    if not block.outlier_fraction_before:  # a block that was asked for
        block = max(c.blocks, key=lambda b: b.outlier_fraction_before)
    verb = "are no more seen" if c.outcome == "cannot tell" else f"are {c.outcome}"
    if c.outcome == "not removed" and not _is_fix(c):
        verb = "are in the second model too"
    same = "The two models are the same. " if c.same_model and c.outcome == "not removed" else ""
    return [
        f"{same}The artifacts of {c.before.model['name']} {verb}: after block {block.block}, "
        f"{percent(block.outlier_fraction_before)} of the patches had norms of {number(block.threshold or 0)} or more, "
        f"now {percent(block.outlier_fraction_after)}. The largest norm was {number(block.max_before)} and is "
        f"{number(block.max_after)}; the median was {number(block.median_before)} and is {number(block.median_after)}."
    ]


def _why(c: Comparison) -> list[str]:
    worst = max(c.blocks, key=lambda b: b.outlier_fraction_after)
    if not worst.outlier_fraction_after:
        return []
    left = [b.block for b in c.blocks if b.outlier_fraction_after > REMOVED] or [worst.block]
    text = (
        f"What is left: {percent(worst.outlier_fraction_after)} of the patches after block {worst.block}, with norms "
        f"up to {number(worst.max_after)}"
    )
    if not _is_fix(c):
        return [text + "."]
    onset, text = c.before.onset_block or 0, f"{text}. It appears in block {left[0]}"
    if left[0] > onset:
        text += f", later than before ({onset}): units of that block write it."
    elif left[0] < onset:
        text += f", before block {onset}, where the artifacts were: the change made it."
    else:
        text += " as before: other units, or attention, write it too."
    return [text + " More images may show which; a checkpoint trained with registers has none."]


def _is_fix(c: Comparison) -> bool:
    """Whether the second model is the first one changed: of others nobody can say why outliers are left."""
    return c.after.model["changes"] != c.before.model["changes"]


def _attention(c: Comparison) -> list[str]:
    pairs = [(b.attention_on_outliers_before, b.attention_on_outliers_after, b.block) for b in c.blocks]
    known = [(one, two, block) for one, two, block in pairs if one is not None and two is not None]
    if not known or not c.before.has_artifacts:
        return []
    one, two, block = max(known)
    return [f"Of the class token's attention in block {block}, {percent(one)} went to outliers, now {percent(two)}."]


def _registers(c: Comparison) -> list[str]:
    if c.after.register_norms is None:
        return []
    block = c.before.block if c.before.has_artifacts else c.after.block
    of = [
        f"the {counted(len(norms), kind) if len(norms) > 1 else kind} of the second model "
        f"{'have norms' if len(norms) > 1 else 'has a norm'} of {', '.join(number(float(n)) for n in norms)}"
        for kind, norms in summary_and_registers(c.after, block)
    ]
    several = c.after.register_norms.shape[1] > 1
    text = f"After block {block} {' and '.join(of)}"
    share = c.blocks[block].attention_on_registers_after
    if share is not None:
        text += f" and take{'' if several else 's'} {percent(share)} of the class token's attention"
    return [text + "."]


def _features(c: Comparison) -> list[str]:
    if c.patch_similarity is None:
        return []
    clean = "the patches that were no outliers" if c.before.has_artifacts else "the patches"
    text = f"The output features of {clean} have a mean cosine of {c.patch_similarity:.3f} with the old ones"
    if c.cls_similarity is not None:
        text += f", the class token {c.cls_similarity:.3f}"
    if c.head_agreement is not None:
        text += f"; the head's largest output is the same for {percent(c.head_agreement)} of the images"
    return [text + "."]
