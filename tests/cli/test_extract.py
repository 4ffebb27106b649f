"""`vitreg extract` and `vitreg diagnose --store`."""

from __future__ import annotations

import json
import shutil

import pytest

import vitreg
from vitreg import cli

MODEL = ("--model", "vitreg_tiny", "--size", "64", "--device", "cpu")


def run(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*map(str, words)])
    return exit.value.code


@pytest.fixture
def photos(photographs, tmp_path):
    (tmp_path / "photos").mkdir()
    for path in photographs[:5]:
        shutil.copy(path, tmp_path / "photos")
    (tmp_path / "photos" / "x.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def test_a_store_is_written_and_diagnosed(photos, tmp_path, capsys):
    out = tmp_path / "store"
    assert run("extract", photos, *MODEL, "--out", out, "--tokens", "cls", "--shard-size", 2, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["num_images"], told["num_skipped"], told["num_shards"]) == (5, 1, 3)
    assert vitreg.open_store(out)[0]["cls"].shape == (vitreg.load("vitreg_tiny").config.embed_dim,)
    assert run("diagnose", "--store", out, "--out", tmp_path / "report", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 5
    assert run("extract", photos, *MODEL, "--out", out, "--tokens", "cls", "mean") == 2
    assert "store holds features of another config: tokens ('cls',)" in capsys.readouterr().err


def test_processes_of_torchrun_and_slurm_take_their_shards(photos, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "store", ("extract", photos, *MODEL, "--tokens", "cls", "--shard-size", 2)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert run(*words, "--out", out) == 0
    assert "the shards of process 1 of 2 are there, others are not" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unfinished"):
        vitreg.open_store(out)
    assert run(*words, "--out", out, "--shard", "0/2") == 0
    assert len(vitreg.open_store(out)) == 6
    assert run(*words, "--out", out, "--shard", "2/2") == 2
    assert "--shard 2/2 must be I/N" in capsys.readouterr().err


def test_a_dry_run_says_what_it_takes_and_writes_nothing(photos, tmp_path, capsys):
    assert run("extract", photos, *MODEL, "--out", tmp_path / "store", "--shard-size", 2, "--dry-run") == 0
    told = capsys.readouterr().out
    assert told.startswith("6 images in 3 shards take ")
    assert "images per second" in told
    assert not (tmp_path / "store").exists()


def test_what_does_not_go_together(tmp_path, capsys):
    assert run("diagnose", "x", "--store", tmp_path) == 2
    assert "leave IMAGES and --model out" in capsys.readouterr().err
    assert run("diagnose", "x") == 2
    assert "diagnose needs --model; see vitreg diagnose --help" in capsys.readouterr().err
    assert run("diagnose", "--store", tmp_path) == 2
    assert "holds no feature store" in capsys.readouterr().err
