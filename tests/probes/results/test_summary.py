"""What an evaluation says in plain data and tables, from answers made up for the purpose."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest

from vitreg.probes.results.result_cache import Answer, Asked, Shown, load_answer, save_answer, with_earlier
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.results.summary import Evaluated, pair_up, summarize
from vitreg.probes.results.tables import LEGEND, headline_table, markdown, write_csv

RIGHT = np.random.default_rng(0).random(500)


def model(name: str, num_registers: int, accuracy: float) -> Evaluated:
    """Right about the same images as a model of lower accuracy, and a few more."""
    knn = ProbeResult("knn", (Score.mean("top-1", accuracy > RIGHT, unit="%", subject="k = 10"),))
    errors = Score.mean(
        "position distance", 1 - accuracy + RIGHT / 100, unit="patches", lower_is_better=True, subject="normal"
    )
    empty = Score.none(
        "position distance", "there are 3 outliers", unit="patches", lower_is_better=True, subject="outlier"
    )
    results = {"knn": knn, "position": ProbeResult("position", (errors, empty))}
    return Evaluated(name, {probe: answer(name, num_registers, probe, of) for probe, of in results.items()})


def answer(name: str, num_registers: int, probe: str, result: ProbeResult, **asked: Any) -> Answer:
    known: dict[str, Any] = {
        "settings": "k", "weights": f"of {name}", "architecture": "ViT-S", "task": "classification", "images": "photos",
        "num_train": 900, "num_val": 500, "data": "digest", "preprocess": "crop", "size": [224, 224],
    }  # fmt: skip
    return Answer(Asked(**known | {"probe": probe, "model": name, "num_registers": num_registers} | asked), result)


@pytest.fixture
def summary():
    models = [
        model("plain", 0, 0.70),
        model("plain | reg", 4, 0.80),
        model("other", 0, 0.5),
        model("other reg", 1, 0.5),
    ]
    return summarize(models)


def test_pairs_are_a_model_and_the_nearest_before_it_with_fewer_registers():
    assert pair_up([model("", n, 0.5).model for n in (0, 4, 0, 1, 4, 4)]) == [None, 0, None, 2, 3, 3]
    assert pair_up([model("", n, 0.5).model for n in (4, 0)]) == [None, None]


def test_differences_are_marked_where_they_exceed_their_interval(summary):
    json.dumps(summary, allow_nan=False)
    marks = {}
    for row in summary["models"]:
        scores = [score for probe in row["probes"].values() for score in probe["scores"]]
        marks[row["name"]] = [score["difference"] and score["difference"]["better"] for score in scores]
    assert marks == {
        "plain": [None] * 3,
        # A smaller error is better; of what is missing there is no difference.
        "plain | reg": [True, True, None],
        "other": [None] * 3,
        "other reg": [None] * 3,
    }
    assert [row["compared_with"] for row in summary["models"]] == [None, "plain", None, "other"]
    better, equal = summary["verdict"]
    assert better.startswith("plain | reg against plain: better in top-1, k = 10 (k-NN) by +")
    assert "position distance, normal (position) by -0.100 patches [-0.100, -0.100]" in better
    assert equal == "other reg against other: 2 figures do not differ significantly."


def test_tables(summary):
    header, rows = headline_table(summary)
    assert header == [
        "model",
        "k-NN, 224 px: top-1 (%) ↑, k = 10",
        "position, 224 px: position distance (patches) ↓, normal",
    ]
    assert rows[1][1].endswith("▲")
    assert not rows[0][1].endswith("▲")
    text = markdown(summary)
    assert r"| plain \| reg | 224 px | normal |" in text
    assert "| outlier | – |" in text
    assert "– plain, outlier: there are 3 outliers" in text
    assert text.endswith(LEGEND + "\n")
    records = list(csv.DictReader(io.StringIO(write_csv(summary))))
    assert len(records) == 12
    found = next(r for r in records if r["model"] == "plain | reg" and r["probe"] == "knn")
    assert float(found["value"]) == pytest.approx(100 * (RIGHT < 0.8).mean())
    assert found["significant"] == "True"
    missing = next(r for r in records if r["missing"])
    assert missing["value"] == ""


def test_unrelated_models_are_no_pair():
    """A fix of a ViT-Ti that comes after a CLIP is no worse CLIP."""
    plain = model("CLIP", 0, 0.8)
    knn = model("fixed", 1, 0.5).answers["knn"].result
    fixed = Evaluated("fixed", {"knn": answer("fixed", 1, "knn", knn, architecture="ViT-Ti")})
    found = summarize([plain, fixed])
    assert found["verdict"] == []
    assert [row["compared_with"] for row in found["models"]] == [None, None]


def test_figures_of_other_sizes_are_not_compared():
    plain, fixed = model("plain", 0, 0.5), model("fixed", 1, 0.8)
    at_518 = answer("fixed", 1, "knn", fixed.answers["knn"].result, size=[518, 518])
    found = summarize([plain, Evaluated("fixed", {**fixed.answers, "knn": at_518})])
    assert found["models"][1]["probes"]["knn"]["scores"][0]["difference"] is None
    assert found["models"][1]["probes"]["position"]["scores"][0]["difference"] is not None
    header, rows = headline_table(found)
    assert header[1:] == ["k-NN: top-1 (%) ↑, k = 10", "position, 224 px: position distance (patches) ↓, normal"]
    assert [row[1].partition("] ")[2] for row in rows] == ["at 224 px", "at 518 px"]
    assert {(row["probe"], row["height"]) for row in csv.DictReader(io.StringIO(write_csv(found)))} == {
        ("knn", "224"), ("knn", "518"), ("position", "224")
    }  # fmt: skip


def test_quick_figures_are_called_so_and_stand_beside_those_of_the_protocol():
    plain = model("plain", 0, 0.5)
    quick = answer("plain", 0, "knn-quick", plain.answers["knn"].result)
    found = summarize([Evaluated("plain", {"knn-quick": quick, **plain.answers})])
    probes = found["models"][0]["probes"]
    assert list(probes) == ["knn", "knn-quick", "position"]
    assert [probes[name]["quick"] for name in probes] == [False, True, False]
    assert "| k-NN, quick, 224 px: top-1" in markdown(found)


def test_what_cannot_be_read_is_said():
    of = model("plain", 0, 0.5).answers["knn"].result
    of = dataclasses.replace(of, details={"skipped": {"training": 0, "validation": 3}})
    found = summarize([Evaluated("plain", {"knn": answer("plain", 0, "knn", of)})], ["A note."])
    assert found["notes"] == ["A note.", "3 validation images of photos cannot be read and count for nothing."]
    assert found["notes"][1] in markdown(found)


def test_answers_are_kept_for_the_same_question(tmp_path):
    path = tmp_path / "answers" / "a.safetensors"
    result = model("plain", 0, 0.7).answers["position"].result
    result = dataclasses.replace(result, details={"counts": [1, 2]})
    shown = Shown("a.png", np.zeros((3, 3, 3), np.uint8), np.eye(3, dtype=np.uint8), np.eye(3, dtype=np.uint8))
    kept = Answer(answer("plain", 0, "position", result).asked, result, {7: shown})
    assert load_answer(path, kept.asked) is None
    save_answer(path, kept)
    assert load_answer(path, dataclasses.replace(kept.asked, data="other")) is None
    again = load_answer(path, kept.asked)
    assert again is not None
    assert again.result.details == result.details
    scores = again.result.scores
    assert [score.value for score in scores] == pytest.approx([s.value for s in result.scores], nan_ok=True)
    assert scores[1].missing == "there are 3 outliers"
    np.testing.assert_array_equal(again.shown[7].prediction, np.eye(3))
    assert again.shown[7].name == "a.png"
    path.write_bytes(path.read_bytes()[:-5])
    assert load_answer(path, kept.asked) is None


def test_evaluations_add_up_where_they_agree_and_say_where_they_do_not(tmp_path):
    result = model("plain", 0, 0.7).answers["knn"].result

    def kept(name: str, probe: str, **asked: Any) -> Answer:
        found = answer(name, 0, probe, result, **asked)
        save_answer(tmp_path / f"{name}-{probe}-{len(list(tmp_path.iterdir()))}.safetensors", found)
        return found

    def table(*now: Answer) -> tuple[set[tuple[str, str]], list[str]]:
        found, left_out = with_earlier(tmp_path, now)
        return {(one.asked.model, one.asked.probe) for one in found}, left_out

    kept("plain", "knn")
    assert table(kept("plain", "linear")) == ({("plain", "knn"), ("plain", "linear")}, [])
    everything = {("plain", "knn"), ("plain", "linear"), ("reg", "linear")}
    assert table(kept("reg", "linear")) == (everything, [])
    dense = kept("reg", "depth", task="depth", data="others")
    assert table(dense) == (everything | {("reg", "depth")}, [])
    found, left_out = table(answer("new", 0, "tokens", result, data="others", images="paintings"))
    assert found == {("new", "tokens"), ("reg", "depth")}
    assert len(left_out) == 3
    assert left_out[0].startswith(
        "linear of reg is left out: it is of other images, targets or classes: photos (900 and"
    )
    _, left_out = table(answer("new", 0, "tokens", result, data="others"))
    assert left_out[0].endswith("with other targets or classes, or before its files changed")
    found, left_out = table(answer("plain", 0, "tokens", result, weights="new"))
    assert {sentence.rpartition(" is ")[2] for sentence in left_out} == {"of other weights of that name"}
    assert found == {("plain", "tokens"), ("reg", "linear"), ("reg", "depth")}
    _, left_out = table(answer("new", 0, "linear", result, settings="other"))
    assert left_out[0].endswith("of other settings")
    _, left_out = table(answer("new", 0, "linear", result, version="0.0"))
    assert "not 0.0" in left_out[0]
