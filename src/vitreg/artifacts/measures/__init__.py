"""What a diagnosis measures beside norms, a file each: what is computed of a trace, added up, and said of it."""

from vitreg.artifacts.measures.faithfulness import (
    BlockFaithfulness,
    Faithfulness,
    FaithfulnessSums,
)
from vitreg.artifacts.measures.ranges import (
    BlockRanges,
    Range,
    Ranges,
    RangeSums,
    probe_images,
    say_ranges,
    say_ranges_changed,
)
from vitreg.artifacts.measures.sinks import SinkHead, Sinks, SinkSums

__all__ = [
    "MEASURES",
    "BlockFaithfulness",
    "BlockRanges",
    "Faithfulness",
    "Range",
    "Ranges",
    "SinkHead",
    "Sinks",
    "probe_images",
    "say_ranges",
    "say_ranges_changed",
]

MEASURES = {"faithfulness": FaithfulnessSums, "sinks": SinkSums, "ranges": RangeSums}
"""By field of `Diagnosis` what adds it up: `summaries` that a trace is asked for, `add` and `conclude`."""
