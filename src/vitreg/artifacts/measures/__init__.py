"""What a diagnosis measures beside norms, a file each: what is computed of a trace, added up, and said of it."""

from vitreg.artifacts.measures.ranges import (
    BlockRanges,
    Range,
    Ranges,
    RangeSums,
    probe_images,
    say_ranges,
    say_ranges_changed,
)

__all__ = [
    "MEASURES",
    "BlockRanges",
    "Range",
    "RangeSums",
    "Ranges",
    "probe_images",
    "say_ranges",
    "say_ranges_changed",
]

MEASURES = {"ranges": RangeSums}
"""By field of `Diagnosis` what adds it up: `summaries` that a trace is asked for, `add` and `conclude`."""
