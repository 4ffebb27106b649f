"""`vitreg fix` and `vitreg compare` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vitreg
from registers.planting import random_vit
from vitreg.cli import main

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(autouse=True)
def _checkpoints(test_data: Path, monkeypatch):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))


def run(*args) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return stop.value.code


@pytest.fixture(scope="module")
def fixed(_tiny_vit, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fixed") / "fixed.safetensors"
    vitreg.save(vitreg.add_test_time_registers(_tiny_vit, neurons=[(7, 417), (6, 189)]), path)
    return path


def test_fix_writes_a_model_and_a_report(photographs, tmp_path, capsys):
    out, report = tmp_path / "new" / "fixed.safetensors", tmp_path / "report"
    assert run("fix", *photographs, "--model", TINY, "--out", out, "--report", report) == 0
    said = capsys.readouterr().out
    assert "block 7: 417" in said
    assert f"The fixed model is {out}" in said
    assert "are removed: after block 11" in said
    assert sorted(p.name for p in report.glob("[!.]*")) == ["comparison.json", "comparison.png", "report.html"]
    vit = vitreg.load(str(out))
    assert (vit.num_registers, (7, 417) in vit.config.register_neurons) == (1, True)
    assert run("diagnose", *photographs[:4], "--model", out, "--out", tmp_path / "d") == 0
    assert "No artifacts in" in capsys.readouterr().out


def test_fix_prints_json(photographs, tmp_path, capsys):
    out = tmp_path / "fixed.safetensors"
    assert run("fix", *photographs, "--model", TINY, "--out", out, "--registers", 2, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fixed"]
    assert [7, 417] in result["register_neurons"]
    assert vitreg.load(str(out)).num_registers == 2


def test_fix_lists_what_it_could_not_read(photographs, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    arguments = (
        "fix",
        *photographs[:16],
        tmp_path / "broken.jpg",
        "--model",
        TINY,
        "--out",
        tmp_path / "f.safetensors",
    )
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "skipped 1 file" in said
    assert "broken.jpg" in said
    assert run(*arguments, "--strict") == 2
    assert "broken.jpg" in capsys.readouterr().err


def test_fix_leaves_a_clean_model_alone(photographs, tmp_path, capsys):
    vitreg.save(random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3), tmp_path / "clean.safetensors")
    out = tmp_path / "fixed.safetensors"
    arguments = ("fix", *photographs, "--model", tmp_path / "clean.safetensors", "--out", out)
    assert run(*arguments) == 0
    assert "No register was added. No artifacts in" in capsys.readouterr().out
    assert run(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["fixed"] is False
    assert not out.exists()


def test_compare_writes_and_prints(photographs, fixed, tmp_path, capsys):
    assert run("compare", TINY, fixed, *photographs[:8], "--out", tmp_path) == 0
    assert "are removed" in capsys.readouterr().out
    assert {p.name for p in tmp_path.glob("[!.]*")} == {"comparison.json", "comparison.png", "report.html"}
    assert run("compare", TINY, fixed, *photographs[:4], "--out", tmp_path, "--limit", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_images"], result["outcome"]) == (3, "removed")


def test_compare_takes_many_models(photographs, fixed, tmp_path, capsys):
    """What comes after the second model and is no image is a model, too."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for path in photographs[:4]:
        (folder / path.name).symlink_to(path)
    assert run("compare", TINY, fixed, TINY, fixed, folder, "--out", out) == 0
    said = capsys.readouterr().out
    assert said.count("removed") == 3
    assert "4 images in" in said
    names = ("fixed", TINY, "fixed-2")
    assert {p.name for p in out.glob("[!.]*")} == {"comparisons.json", "report.html", *names}
    assert all((out / name / "report.html").is_file() for name in names)
    assert all(f'href="{name}/report.html"' in (out / "report.html").read_text() for name in names)
    result = json.loads((out / "comparisons.json").read_text())
    assert [c["outcome"] for c in result["comparisons"].values()] == ["removed", "not removed", "removed"]
    assert run("compare", TINY, fixed, *photographs[:4], "--out", tmp_path / "two", "--json") == 0
    two, one_of_three = json.loads(capsys.readouterr().out), result["comparisons"]["fixed"]
    assert {key: two[key] for key in ("blocks", "outcome", "patch_similarity", "cls_similarity", "verdict")} == {
        key: one_of_three[key] for key in ("blocks", "outcome", "patch_similarity", "cls_similarity", "verdict")
    }


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["photos"], 0),
        (["c.safetensors", "photos/"], 1),
        (["dinov2_vitb14", "facebook/dinov2-base", "run.pth", "*.jpg"], 3),
        (["nothing.jpg", "photos"], 0),
        (["nowhere/", "photos"], 0),
        (["dinov2_vitb14"], 0),
    ],
)
def test_words_before_the_images_may_be_models(words, count):
    from vitreg.cli.compare import models_among

    assert models_among(words) == (words[:count], words[count:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fix", "{photos}", "--model", TINY, "--out", "fixed.pth"], "must end in .safetensors"),
        (["fix", "{photos}", "--model", TINY, "--out", "/proc/no/f.safetensors"], "cannot write to /proc/no"),
        (
            ["fix", "{photos}", "--model", TINY, "--out", "{out}", "--limit", "5"],
            "5 images cannot tell which units write artifacts",
        ),
        (
            ["fix", "{photos}", "--model", TINY, "--out", "{out}", "--registers", "0"],
            "--registers 0 must be at least 1",
        ),
        (
            ["fix", "{photos}", "--model", TINY, "--out", "{out}", "--method", "prefix", "--registers", "2"],
            "--method prefix adds no registers",
        ),
        (["fix", "nowhere/", "--model", TINY, "--out", "{out}"], "nowhere"),
        (["compare", TINY, "nothing.safetensors", "{photos}"], "nothing.safetensors"),
    ],
)
def test_errors_are_one_line(arguments, message, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photographs[:8]:
        (folder / path.name).symlink_to(path)
    named = {"photos": folder, "out": tmp_path / "fixed.safetensors"}
    assert run(*(a.format(**named) for a in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "fixed.safetensors").exists()


def test_an_old_file_survives_a_failed_fix(photographs, tmp_path):
    out = tmp_path / "fixed.safetensors"
    out.write_bytes(b"old")
    assert run("fix", *photographs[:5], "--model", TINY, "--out", out) == 2
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("method", "change", "registers"), [("prefix", "silenced", 0), ("baked", "became 3 ordinary ones", 3)]
)
def test_fix_by_other_methods(method, change, registers, photographs, tmp_path, capsys):
    out = tmp_path / "fixed.safetensors"
    assert run("fix", *photographs[:16], "--model", TINY, "--out", out, "--method", method, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["register_neurons"]) == (method, [])
    assert change in result["change"]
    assert vitreg.load(str(out)).num_registers == registers
