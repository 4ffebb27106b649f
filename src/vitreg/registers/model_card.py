"""The model card of a repository on the hub: what was done to a model, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from vitreg.artifacts import Comparison, Diagnosis
from vitreg.checkpoints import registry
from vitreg.common.words import counted, number, percent
from vitreg.model import ViTConfig

TAGS = ("vision-transformer", "registers", "model_hub_mixin", "pytorch_model_hub_mixin")
"""The last two are those of `huggingface_hub.PyTorchModelHubMixin`, by which such repositories are found."""


def model_card(
    config: ViTConfig, repo_id: str, findings: Comparison | Diagnosis | None, license: str | None, figure: str | None
) -> str:
    """README.md: metadata, what the model is, what was done, what was found, how to use it.

    Args:
        config: of the model.
        repo_id: where it goes.
        findings: of it, or of the original and it.
        license: by the hub's name; by default that of the released weights it was made from, where they are known.
        figure: file of the image beside the card, where there is one.
    """
    license = license or _license_of(config.name.partition(" + ")[0])
    named = license is not None and license.endswith("-license")  # one that the hub has no name for
    metadata = {
        "library_name": "vitreg",
        "pipeline_tag": "image-feature-extraction",
        "license": "other" if named else license,
        "license_name": license if named else None,
        "tags": list(TAGS),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value), "---", ""]
    lines += [f"# {repo_id.rpartition('/')[2]}", "", _described(config), ""]
    lines += ["## What was done", "", *_listed(config.changes or ("Nothing: these are the weights as they were.",))]
    if findings is not None:
        lines += ["## What was found", "", *_listed(findings.verdict)]
        if figure is not None:
            lines += [f"![Photographs, norm maps and attention maps of the model]({figure})", ""]
        lines += [
            *_table(findings),
            "",
            f"On {counted(findings.num_images, 'image')}; `report.html` has every block.",
            "",
        ]
    lines += ["## Use", "", "```python", "import vitreg", "", f'vit = vitreg.load("{repo_id}")']
    lines += ["tokens = vit(images)  # vit.preprocess prepares them; tokens.cls, tokens.registers, tokens.patches"]
    if config.num_registers:
        lines += ["# vitreg.install_registers runs the registers inside a model of timm, transformers or open_clip"]
    return "\n".join([*lines, "```", ""])


def _license_of(name: str) -> str | None:
    """That of released weights, by their short name or timm's; None for others."""
    return next((model.licence for model in registry.MODELS if name and name in (model.name, model.timm)), None)


def _described(config: ViTConfig) -> str:
    height, width = config.image_size
    registers = counted(config.num_registers, "register")
    if config.num_test_time_registers:
        registers += f", {config.num_test_time_registers} of them untrained"
    heads = f"{config.num_classes} outputs" if config.num_classes else "no head"
    return (
        f"{config.name or config.architecture or 'A Vision Transformer'}: {config.depth} blocks of {config.embed_dim} "
        f"channels, patches of {config.patch_size} pixels, images of {height} x {width}, {registers}, {heads}. In the "
        f"format of [vitreg](https://pypi.org/project/vitreg)."
    )


def _listed(sentences: Iterable[str]) -> list[str]:
    return [*(f"- {sentence}" for sentence in sentences), ""]


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("outlier patches, worst block", "outlier_fraction", percent),
    ("largest patch norm", "max", number),
    ("class token's attention on outliers, worst block", "attention_on_outliers", percent),
)
"""What is said of a block, and the attribute that holds it."""


def _table(findings: Comparison | Diagnosis) -> list[str]:
    """The figures; of a comparison, both models by one threshold."""
    when = ("",) if isinstance(findings, Diagnosis) else ("_before", "_after")
    rows = [
        (what, *(told(max(getattr(block, field + one) or 0.0 for block in findings.blocks)) for one in when))
        for what, field, told in _FIGURES
    ]
    if isinstance(findings, Diagnosis):
        return ["| | |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    similar = f"{_cosine(findings.patch_similarity)}, {_cosine(findings.cls_similarity)}"
    rows += [
        ("cosine of patches, of class tokens", "", similar),
        ("same largest output", "", percent(findings.head_agreement)),
    ]
    return ["| | before | after |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
