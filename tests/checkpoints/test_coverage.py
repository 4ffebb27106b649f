"""Every model of timm, transformers and open_clip with a ViT is read or refused in a sentence, as the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitreg.checkpoints.coverage import Covered, coverage, markdown, versions

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

pytestmark = pytest.mark.filterwarnings("ignore")


def section(page: str, library: str) -> list[str]:
    """The lines on a library."""
    lines = page.splitlines()
    begin = lines.index(f"## {library}")
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    return [line for line in lines[begin:end] if line]


@pytest.mark.parametrize("library", ["timm", "transformers", "open_clip"])
def test_every_model_is_read_or_refused_in_a_sentence_and_in_the_page(library):
    """Whatever else is raised fails the test. The page is written by `vitreg models --coverage > docs/models.md`."""
    pytest.importorskip(library)
    models = list(coverage(libraries=[library]))
    assert models
    for model in models:
        assert (model.status == "refused") == bool(model.sentence)
        if model.status == "refused":
            assert "\n" not in model.sentence, model
            assert len(model.sentence) > 20, model
            assert model.detail, model
    page = PAGE.read_text(encoding="utf-8")
    if f"{library} {versions()[library]}" in page.splitlines()[0]:
        assert section(markdown(models), library) == section(page, library), "vitreg models --coverage > docs/models.md"


def test_models_that_share_a_reason_share_a_line():
    models = [
        Covered("timm", "eva", "a", "converted"),
        Covered("timm", "eva", "b", "refused", "a part", "b has a part"),
        Covered("timm", "eva", "c", "converted"),
        Covered("transformers", "llava", "d", "converted", "model.vision_tower"),
    ]
    text = markdown(models)
    assert "| timm | 3 | 2 | 1 |" in text
    assert "| `eva` | a, c | converted |" in text
    assert "| `eva` | b | refused: a part |" in text
    assert "| `llava` | d | converted: model.vision_tower |" in text
