"""Numbers in words that no page's script says; the others are in `tests/report/test_words.py`."""

from __future__ import annotations

import pytest

from vitreg.common.words import duration, safe_name, size_in_words


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "1 s"), (5.0, "5 s"), (89.0, "89 s"), (150.0, "2 min"), (7100.0, "118 min"), (7500.0, "2 h 05 min")],
)
def test_durations(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize(("num_bytes", "told"), [(0, "0 bytes"), (999, "999 bytes"), (5.24e9, "5.24 GB")])
def test_sizes(num_bytes, told):
    assert size_in_words(int(num_bytes)) == told


def test_safe_names_have_no_folder_and_are_not_hidden():
    assert safe_name("facebook/dinov2-large") == "facebook-dinov2-large"
    assert safe_name("/runs/.a b/model.pth") == "runs-.a-b-model.pth"
    assert len(safe_name("a" * 300)) == 100
