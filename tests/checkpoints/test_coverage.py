"""Every model of timm, transformers and open_clip with a ViT is read, observed or refused, as the page says."""

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


def written(library: str) -> dict[tuple[str, str], str]:
    """What the page says of a library's models, by module and name; empty where it is of another version."""
    page = PAGE.read_text(encoding="utf-8")
    if f"{library} {versions()[library]}" not in page.splitlines()[0]:
        return {}
    rows = [
        row.strip("| ").split(" | ")
        for row in page.partition(f"\n## {library}\n")[2].partition("\n## ")[0].splitlines()
    ]
    return {(row[0].strip("`"), name): row[2] for row in rows if len(row) == 3 for name in row[1].split(", ")}


@pytest.mark.parametrize("library", ["timm", "transformers", "open_clip"])
def test_every_model_is_read_or_refused_in_a_sentence_and_in_the_page(library):
    """Whatever else is raised fails the test. The page is written by `vitreg models --coverage > docs/models.md`."""
    pytest.importorskip(library)
    models = list(coverage(libraries=[library], observing=False))
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
    if page := written(library):
        assert page.keys() == {(model.module, model.name) for model in models}, (
            "vitreg models --coverage > docs/models.md"
        )
        for model in models:
            said = page[model.module, model.name]
            if model.status == "converted":
                assert said == (f"converted: {model.detail}" if model.detail else "converted"), model
            else:
                assert said == f"observed: {model.detail}" or said.startswith("refused: "), model


@pytest.mark.parametrize(
    ("library", "filter", "statuses"),
    [
        ("timm", "test_vit3", {"observed"}),
        ("timm", "hiera_tiny", {"observed"}),
        ("open_clip", "vitamin-s", {"observed"}),
        ("transformers", "swinv2", {"observed"}),
        ("transformers", "vjepa2", {"observed"}),
        ("transformers", "qwen2_5_vl", {"observed"}),
        ("transformers", "got_ocr2", {"observed"}),
        ("transformers", "mllama", {"refused"}),
    ],
)
def test_what_is_not_converted_is_observed_for_a_try(library, filter, statuses):
    pytest.importorskip(library)
    models, page = list(coverage(filter, [library])), written(library)
    assert {model.status for model in models} == statuses
    for model in models if page else ():
        assert page[model.module, model.name] == f"{model.status}: {model.detail}"
    if "refused" in statuses:  # classes with one tower share what came of it
        assert len({model.sentence for model in models}) == 1
        assert "missing 2 required positional arguments" in models[0].sentence


def test_models_that_share_a_reason_share_a_line():
    models = [
        Covered("timm", "eva", "a", "converted"),
        Covered("timm", "eva", "b", "observed", "a part", "b has a part"),
        Covered("timm", "eva", "e", "refused", "does not run", "e does not run"),
        Covered("timm", "eva", "c", "converted"),
        Covered("transformers", "llava", "d", "converted", "model.vision_tower"),
    ]
    text = markdown(models)
    assert "| timm | 4 | 2 | 1 | 1 |" in text
    assert "| `eva` | a, c | converted |" in text
    assert "| `eva` | b | observed: a part |" in text
    assert "| `eva` | e | refused: does not run |" in text
    assert "| `llava` | d | converted: model.vision_tower |" in text
