"""What commands print while they run."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from vitreg.cli import output
from vitreg.cli.output import progress


def test_a_log_shows_life_a_line_an_interval(capsys):
    """Done of total, rate and time left; what was found done does not count for the rate."""
    with progress("looking", interval=0.0) as advance:
        advance(100, 1000)
        advance(150, 1000, "loss 3")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "looking: 100 of 1,000"
    assert second.startswith("looking: 150 of 1,000, ")
    assert second.endswith(" left, loss 3")
    assert " per second, " in second
    with progress("looking", interval=3600.0) as advance:
        advance(1, None)
    assert capsys.readouterr().err == ""


def test_every_command_that_takes_long_tells(monkeypatch, photographs, test_data, tmp_path, capsys):
    from vitreg import cli

    monkeypatch.setattr(output, "INTERVAL", 0.0)
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))
    images = [str(path) for path in photographs[:4]]
    for words in (["diagnose", "--model", "vitreg_tiny"], ["compare", "vitreg_tiny", "vitreg_tiny"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words, *images, "--batch-size", "2", "--out", str(tmp_path / words[0])])
        assert "4 of 4" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("note", ["", "loss 3.142, 1234 images/s, 17 skipped, and more than fits"])
def test_the_bar_fits_80_columns(note):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with progress("looking at images with facebook/dinov2-with-registers-large", console=console) as advance:
        advance(1_234_567, 12_345_678, note)
    for line in file.getvalue().replace("\r", "\n").splitlines():
        assert cell_len(Text.from_ansi(line).plain.rstrip()) <= 80
