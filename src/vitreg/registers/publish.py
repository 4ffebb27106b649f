"""A model, fixed or not, as a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import huggingface_hub
from torch import nn

from vitreg.artifacts import Comparison, Diagnosis
from vitreg.checkpoints import from_module, save
from vitreg.checkpoints.hub import REPOSITORY_FILES, reachable_hub
from vitreg.checkpoints.state import one_line
from vitreg.common.disk import replace_text, write_json
from vitreg.model import VisionTransformer
from vitreg.registers.model_card import model_card
from vitreg.report import comparison_figure, diagnosis_figure


def push_to_hub(
    vit: VisionTransformer | nn.Module,
    repo_id: str,
    *,
    findings: Comparison | Diagnosis | None = None,
    license: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Push model using vitreg.",
) -> str:
    """Publish a model under `repo_id`, from where `vitreg.load` reads it; a repository is made if there is none.

    As `huggingface_hub.PyTorchModelHubMixin` does: `config.json` and `model.safetensors`, and a model card. The card
    says what was done (`config.changes`); with `findings` also the verdict, figures and the image before and after,
    and the page `report.html` lies beside it.

    Args:
        vit: the model, as for `diagnose`.
        repo_id: `"user/name"`.
        findings: `vitreg.compare(original, vit, images)`, or `vitreg.diagnose(vit, images)`.
        license: of the weights, by the hub's name; by default that of the released weights it was made from.
        token: of the hub; by default the one that `hf auth login` keeps, or `HF_TOKEN`.
        private: whether the repository is made private; by default as the hub decides.
        branch: where the commit goes; `main` by default.
        create_pr: open a pull request instead of a commit.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no token, no network, the hub refuses, or `findings` are of another model.
    """
    vit = from_module(vit)
    if not (token or huggingface_hub.get_token()):
        raise ValueError(
            f"publishing {repo_id} needs a token of the hub: run `hf auth login`, set HF_TOKEN, or give token="
        )
    with tempfile.TemporaryDirectory() as folder:
        save_repository(vit, folder, repo_id, findings=findings, license=license)
        try:
            with reachable_hub():
                api = huggingface_hub.HfApi(token=token)
                repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
        except Exception as error:
            reason = one_line(error).split(". ")[0].rstrip(".;")
            raise ValueError(
                f"could not publish {repo_id}: {reason}. vitreg.registers.save_repository writes the same files into a "
                f"folder, for `hf upload` later"
            ) from error


def save_repository(
    vit: VisionTransformer,
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    findings: Comparison | Diagnosis | None = None,
    license: str | None = None,
) -> None:
    """Write what `push_to_hub` uploads; `vitreg.load` reads the folder too.

    Raises:
        ValueError: the folder cannot be written, or `findings` are of another model.
    """
    folder = Path(folder)
    config_name, weights_name = REPOSITORY_FILES
    figure = None
    if findings is not None:
        model = (findings.after if isinstance(findings, Comparison) else findings).model
        if model["changes"] != list(vit.config.changes) or model["num_registers"] != vit.num_registers:
            raise ValueError(
                f"the findings are of {model['name']}, with other changes than this model; give "
                f"vitreg.compare(original, vit, images) or vitreg.diagnose(vit, images)"
            )
        findings.save(folder)
        summary = findings.to_dict()
        if isinstance(findings, Comparison) and findings.before.examples and findings.after.examples:
            figure = "comparison.png"
            comparison_figure(summary, findings.before.examples, findings.after.examples, folder / figure)
        elif isinstance(findings, Diagnosis) and findings.examples:
            figure = "diagnosis.png"
            diagnosis_figure(summary, findings.examples, folder / figure)
    save(vit, folder / weights_name)
    write_json(folder / config_name, {"library_name": "vitreg", **vit.config.to_dict()})
    replace_text(folder / "README.md", model_card(vit.config, repo_id, findings, license, figure))
