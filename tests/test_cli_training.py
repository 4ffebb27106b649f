"""`vitreg timeline` as a user runs it."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from training.runs import real_diagnoses, write_run
from vitreg import cli


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def found(_tiny_vit, photograph_batch):
    return real_diagnoses(_tiny_vit, photograph_batch[:6])


def test_timeline_draws_says_and_stores(found, tmp_path, capsys):
    none = write_run(tmp_path / "none", {100: found["clean"], 200: found["artifacts"]})
    four = write_run(tmp_path / "four", {100: found["registers"], 200: found["registers"]})
    out = tmp_path / "out"
    assert run("timeline", none, four, "--out", out) == 0
    first, second, see = capsys.readouterr().out.splitlines()
    assert first.startswith("none: artifacts from step 200, block 7 on: ")
    assert second == "four: no artifacts in 2 diagnoses"
    assert str(out / "timeline.png") in see
    assert Image.open(out / "timeline.png").width > 1000
    assert run("timeline", none, four, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "timeline.json").read_text())
    assert [run["first_step"] for run in printed["runs"]] == [200, None]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "is no run: it has no config.json"),
        (["empty"], "has no diagnosis yet"),
        (["empty", "empty"], "each once"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(folders, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "empty", {})
    assert run("timeline", *folders) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitreg: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "vitreg-out").exists()
