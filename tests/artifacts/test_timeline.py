"""Reading when artifacts appear, out of run folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from training.runs import line, real_diagnoses, write_run
from vitreg.artifacts.timeline import QUANTILES, read_timeline


@pytest.fixture(scope="module")
def found(_tiny_vit, photograph_batch):
    return real_diagnoses(_tiny_vit, photograph_batch[:6])


def test_quantiles_are_those_of_the_norms(found, tiny_vit, photograph_batch, tmp_path):
    with torch.inference_mode():
        norms = tiny_vit.trace(photograph_batch[:6]).patch_norms.flatten(1).numpy()
    (run,) = read_timeline([write_run(tmp_path / "run", {5: found["artifacts"]})])["runs"]
    for block, expected in zip(run["diagnoses"][0]["blocks"], norms, strict=True):
        # Bins are 6 % wide; between the two modes, where few norms lie, numpy interpolates over a wide gap.
        bulk = [q for q in QUANTILES if q < 0.9]
        np.testing.assert_allclose(block["quantiles"][: len(bulk)], np.quantile(expected, bulk), rtol=0.06)
        lower, upper = np.quantile(expected, 0.99, method="lower"), np.quantile(expected, 0.99, method="higher")
        assert lower / 1.06 <= block["quantiles"][-1] <= upper * 1.06
        assert block["max"] == pytest.approx(expected.max(), rel=1e-5)
        assert max(block["quantiles"]) <= block["max"]
    assert run["diagnoses"][0]["metrics"] == {"top1": 1.5}


def test_registers_and_model_are_told(found, tmp_path):
    (run,) = read_timeline([write_run(tmp_path / "run", {5: found["registers"]})])["runs"]
    assert run["model"]["num_registers"] == 4
    last = run["diagnoses"][-1]["blocks"][-1]["register_norms"]
    np.testing.assert_allclose(last, found["registers"].register_norms[-1], atol=1e-5)


@pytest.mark.parametrize(
    ("course", "first", "verdict"),
    [
        ("c", None, "no artifacts in 1 diagnosis"),
        ("ccc", None, "no artifacts in 3 diagnoses"),
        ("ccaa", 30, "artifacts from step 30, block 7 on: "),
        ("cacaa", 40, "artifacts from step 40, block 7 on: "),
        ("aa", 10, "artifacts from the first diagnosis (step 10), block 7 on: "),
        ("caac", None, "artifacts in 2 of 4 diagnoses, the last at step 30, none at the end"),
    ],
)
def test_the_verdict_says_from_when_on(course, first, verdict, found, tmp_path):
    diagnoses = {10 * i: found["artifacts" if c == "a" else "clean"] for i, c in enumerate(course, start=1)}
    (run,) = read_timeline([write_run(tmp_path / "run", diagnoses)])["runs"]
    assert run["first_step"] == first
    assert run["has_artifacts"] == (first is not None)
    assert run["verdict"].startswith(verdict)
    assert "so far" not in run["verdict"]
    if first is not None:
        assert run["onset_block"] == found["artifacts"].onset_block == 7
        assert f"{100 * found['artifacts'].outlier_fraction:.1f} %" in run["verdict"]


def test_an_unfinished_run_and_artifacts_inside_are_said(found, tmp_path):
    (run,) = read_timeline([write_run(tmp_path / "run", {10: found["clean"], 20: found["inner"]}, num_steps=50)])[
        "runs"
    ]
    assert "from step 20, inside at block 9: " in run["verdict"]
    assert run["verdict"].endswith("; so far 20 of 50 steps")


def test_runs_of_one_depth_are_shown_at_one_block(found, tmp_path):
    inner = write_run(tmp_path / "inner", {1: found["inner"]})
    clean = write_run(tmp_path / "clean", {1: found["clean"]})
    small = write_run(tmp_path / "small", {1: found["small"]})
    assert [run["block"] for run in read_timeline([clean, inner, small])["runs"]] == [9, 9, 2]
    assert [run["block"] for run in read_timeline([clean, small])["runs"]] == [11, 2]


def test_histograms_are_kept_where_they_are_drawn(found, tmp_path):
    run = write_run(tmp_path / "run", {1: found["clean"], 2: found["artifacts"]})
    first, last = read_timeline([run])["runs"][0]["diagnoses"]
    assert [block["histogram"] is not None for block in first["blocks"]] == [False] * 11 + [True]
    assert all(sum(block["histogram"]["counts"]) == 6 * 196 for block in last["blocks"])


def test_a_killed_and_resumed_run_is_read(found, tmp_path):
    """Half a line at the end, or in the middle, and steps that were passed twice: the later one counts."""
    run = write_run(tmp_path / "run", {10: found["clean"], 20: found["artifacts"]})
    torn = line(30, found["artifacts"])[:200]
    with (run / "diagnosis.jsonl").open("a") as file:
        file.write(torn + "\n" + line(20, found["clean"]) + torn)
    (read,) = read_timeline([run])["runs"]
    assert [(d["step"], d["has_artifacts"]) for d in read["diagnoses"]] == [(10, False), (20, False)]


def test_names_tell_runs_apart(found, tmp_path, monkeypatch):
    paths = [
        write_run(tmp_path / "a" / "run", {1: found["clean"]}),
        write_run(tmp_path / "b" / "run", {1: found["clean"]}),
    ]
    assert [run["name"] for run in read_timeline(paths)["runs"]] == ["a/run", "b/run"]
    monkeypatch.chdir(paths[0])
    assert read_timeline([paths[0].relative_to(paths[0])])["runs"][0]["name"] == "run"


def test_it_is_json(found, tmp_path):
    timeline = read_timeline([write_run(tmp_path / "run", {1: found["registers"]})])
    assert json.loads(json.dumps(timeline)) == timeline


def test_what_is_no_run_is_refused_in_a_sentence(found, tmp_path):
    run = write_run(tmp_path / "run", {1: found["clean"]})
    empty = write_run(tmp_path / "empty", {})
    torn = write_run(tmp_path / "torn", {1: found["clean"]})
    (torn / "diagnosis.jsonl").write_text(line(1, found["clean"])[:100])
    none = write_run(tmp_path / "none", {})
    (none / "diagnosis.jsonl").unlink()
    other = write_run(tmp_path / "other", {}, format="something/1")
    foreign = write_run(tmp_path / "foreign", {})
    (foreign / "diagnosis.jsonl").write_text('{"step": 3}\n')
    broken = write_run(tmp_path / "broken", {1: found["clean"]})
    (broken / "config.json").write_text("{")
    for folders, message in (
        ([], "at least one run folder"),
        ([run, run / ".." / "run"], "each once"),
        ([tmp_path / "nowhere"], "nowhere is no folder"),
        ([run / "config.json"], "is no folder"),
        ([tmp_path], "is no run: it has no config.json"),
        ([run, empty], "empty has no diagnosis yet"),
        ([torn], "has no diagnosis yet"),
        ([none], "has no diagnosis yet"),
        ([other], "is not of a training run"),
        ([foreign], "is no diagnosis"),
        ([broken], "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_timeline(folders)
