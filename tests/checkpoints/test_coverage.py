"""Every model of timm, transformers and open_clip with a ViT is read or refused in a sentence, as the page says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vitreg.checkpoints.coverage import Covered, coverage, markdown, versions
from vitreg.checkpoints.transformers_classes import CLASSES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

# Models that hold a Vision Transformer which is read, and where.
WHOLE = {
    "Blip2ForConditionalGeneration": "vision_model",
    "Blip2ForImageTextRetrieval": "vision_model",
    "Blip2Model": "vision_model",
    "Blip2VisionModelWithProjection": "vision_model",
    "BlipForConditionalGeneration": "vision_model",
    "BlipForImageTextRetrieval": "vision_model",
    "BlipForQuestionAnswering": "vision_model",
    "CLIPSegForImageSegmentation": "clip",
    "DPTForDepthEstimation": "dpt",
    "DeiTForMaskedImageModeling": "deit",
    "DPTForSemanticSegmentation": "dpt",
    "DepthAnythingForDepthEstimation": "backbone",
    "FlavaForPreTraining": "flava.image_model",
    "FlavaModel": "image_model",
    "GitForCausalLM": "git.image_encoder",
    "GitModel": "image_encoder",
    "Idefics2ForConditionalGeneration": "model.vision_model",
    "Idefics2Model": "vision_model",
    "Idefics3ForConditionalGeneration": "model.vision_model",
    "Idefics3Model": "vision_model",
    "InstructBlipForConditionalGeneration": "vision_model",
    "InstructBlipModel": "vision_model",
    "InstructBlipVideoForConditionalGeneration": "vision_model",
    "InstructBlipVideoModel": "vision_model",
    "InternVLForConditionalGeneration": "model.vision_tower",
    "InternVLModel": "vision_tower",
    "JanusForConditionalGeneration": "model.vision_model",
    "JanusModel": "vision_model",
    "Kosmos2ForConditionalGeneration": "vision_model.model",
    "Kosmos2Model": "vision_model.model",
    "Kosmos2VisionModel": "model",
    "LlavaForConditionalGeneration": "model.vision_tower",
    "LlavaModel": "vision_tower",
    "OwlViTForObjectDetection": "owlvit",
    "Owlv2ForObjectDetection": "owlv2",
    "PaliGemmaForConditionalGeneration": "model.vision_tower",
    "PaliGemmaModel": "vision_tower",
    "SmolVLMForConditionalGeneration": "model.vision_model",
    "SmolVLMModel": "vision_model",
    "Tipsv2Model": "vision_model",
    "ViTForMaskedImageModeling": "vit",
}
# timm's modules of plain Vision Transformers; of the others no model is read.
PLAIN = ("vision_transformer", "eva", "deit", "beit", "naflexvit", "vision_transformer_relpos")
# Read, but not as their configs are by default.
UNLIKE_THE_DEFAULT = {"YolosModel"}

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
    if library == "transformers":
        found = {model.name: model.detail for model in models if model.status == "converted"}
        assert {name for name, path in found.items() if not path} == set(CLASSES) - UNLIKE_THE_DEFAULT
        assert WHOLE.items() <= found.items()
    refused = Counter(model.module for model in models if model.status == "refused")
    of_module = Counter(model.module for model in models)
    if library == "timm":
        assert set(PLAIN) <= set(of_module)
        for module, count in of_module.items():
            assert refused[module] < 0.3 * count if module in PLAIN else refused[module] == count, module
        hybrid = next(model for model in models if model.name == "vit_base_r50_s16_224")
        assert "patch embedding HybridEmbed" in hybrid.sentence
    if library == "open_clip":
        assert 0.1 < refused.total() / len(models) < 0.5
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
