"""What an evaluation says in plain data and tables, from answers made up for the purpose."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from vitreg.probes.saved import load_result, save_result
from vitreg.probes.score import ProbeResult, Score
from vitreg.probes.summary import Evaluated, pair_up, summarize
from vitreg.probes.tables import LEGEND, headline_table, markdown, write_csv

RIGHT = np.random.default_rng(0).random(500)


def model(name: str, num_registers: int, accuracy: float) -> Evaluated:
    """Right about the same pictures as a model of lower accuracy, and a few more."""
    knn = ProbeResult("knn", (Score.mean("top-1", accuracy > RIGHT, unit="%", subject="k = 10"),))
    errors = Score.mean(
        "position distance", 1 - accuracy + RIGHT / 100, unit="patches", lower_is_better=True, subject="normal"
    )
    empty = Score.none(
        "position distance", "there are 3 outliers", unit="patches", lower_is_better=True, subject="outlier"
    )
    return Evaluated(name, num_registers, {"knn": knn, "position": ProbeResult("position", (errors, empty))})


@pytest.fixture
def summary():
    models = [
        model("plain", 0, 0.70),
        model("plain | reg", 4, 0.80),
        model("other", 0, 0.5),
        model("other reg", 1, 0.5),
    ]
    return summarize(models, {"classification": {"source": "pictures"}})


def test_pairs_are_a_model_and_the_nearest_before_it_with_fewer_registers():
    assert pair_up([0, 4, 0, 1, 4, 4]) == [None, 0, None, 2, 3, 3]
    assert pair_up([4, 0]) == [None, None]


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
    assert header == ["model", "k-NN: top-1 (%) ↑, k = 10", "position: position distance (patches) ↓, normal"]
    assert rows[1][1].endswith("▲")
    assert not rows[0][1].endswith("▲")
    text = markdown(summary)
    assert r"| plain \| reg | normal |" in text
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


def test_answers_are_kept_for_the_same_question(tmp_path):
    path = tmp_path / "answers" / "a.safetensors"
    result = model("plain", 0, 0.7).results["position"]
    result = ProbeResult("position", result.scores, {"counts": [1, 2]}, {7: np.eye(3, dtype=np.uint8)})
    assert load_result(path, "what?") is None
    save_result(path, "what?", result)
    assert load_result(path, "who?") is None
    again = load_result(path, "what?")
    assert again is not None
    assert again.details == result.details
    assert [score.value for score in again.scores] == pytest.approx([s.value for s in result.scores], nan_ok=True)
    assert again.scores[1].missing == "there are 3 outliers"
    np.testing.assert_array_equal(again.predictions[7], np.eye(3))
    path.write_bytes(path.read_bytes()[:-5])
    assert load_result(path, "what?") is None
