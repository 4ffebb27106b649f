"""Models on the hub, which is a folder here: what is uploaded, what the card says, and that it loads again."""

from __future__ import annotations

import inspect
import json
import re
import shutil

import huggingface_hub
import pytest
import torch

import vitreg
from vitreg.images import bundled_photographs
from vitreg.registers import save_repository

UNITS = [(7, 417), (6, 189), (5, 485)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The parts of `huggingface_hub` that are called, on a folder; what is passed must fit the real signatures."""
    root = tmp_path / "hub"
    asked: list[tuple[str, dict]] = []
    real = huggingface_hub.HfApi

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, **keywords):
            inspect.signature(real.create_repo).bind(self, **keywords)
            asked.append(("create_repo", keywords))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{keywords['repo_id']}")

        def upload_folder(self, **keywords):
            inspect.signature(real.upload_folder).bind(self, **keywords)
            asked.append(("upload_folder", keywords))
            shutil.copytree(keywords["folder_path"], root / keywords["repo_id"])
            return f"https://huggingface.co/{keywords['repo_id']}/commit/1"

    def download(repo_id, filename, **keywords):
        asked.append(("download", {"repo_id": repo_id, "filename": filename}))
        if not (root / repo_id / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"{repo_id} has no {filename}")
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return root, asked


@pytest.fixture(scope="module")
def fixed(_tiny_vit):
    return vitreg.add_test_time_registers(_tiny_vit, neurons=UNITS)


def test_a_fixed_model_comes_back(hub, fixed, photograph_batch):
    root, asked = hub
    address = vitreg.push_to_hub(fixed, "user/vit-fixed", private=True, branch="fixed")
    assert address == "https://huggingface.co/user/vit-fixed/commit/1"
    assert {path.name for path in (root / "user/vit-fixed").iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    assert [name for name, _ in asked] == ["create_repo", "upload_folder"]
    assert asked[0][1]["private"] is True
    assert asked[1][1]["revision"] == "fixed"
    again = vitreg.load("user/vit-fixed")
    assert again.config == fixed.config
    with torch.no_grad():
        assert torch.equal(again(photograph_batch[:2]).patches, fixed(photograph_batch[:2]).patches)


def test_the_card_says_what_was_done_and_found(hub, tiny_vit, fixed, test_data):
    root, _ = hub
    images = sorted((test_data / "imagenet-samples").glob("*.jpg"))[::125]
    comparison = vitreg.compare(tiny_vit, fixed, images)
    vitreg.push_to_hub(fixed, "user/vit-fixed", findings=comparison)
    folder = root / "user/vit-fixed"
    card = (folder / "README.md").read_text(encoding="utf-8")
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    metadata = dict(line.split(": ", 1) for line in head.splitlines())
    assert json.loads(metadata["library_name"]) == "vitreg"
    assert json.loads(metadata["license"]) == "apache-2.0"
    assert {"registers", "model_hub_mixin", "pytorch_model_hub_mixin"} <= set(json.loads(metadata["tags"]))
    assert f"- {fixed.config.changes[-1]}" in body
    assert all(f"- {sentence}" in body for sentence in comparison.verdict)
    assert "![Photographs, norm maps and attention maps of the model](comparison.png)" in body
    before = max(block.outlier_fraction_before for block in comparison.blocks)
    assert f"| outlier patches, worst block | {100 * before:.1f} % | 0 % |" in body
    assert 'vit = vitreg.load("user/vit-fixed")' in body
    assert "More Information Needed" not in body
    assert {"comparison.png", "comparison.json", "report.html"} <= {path.name for path in folder.iterdir()}
    assert huggingface_hub.ModelCard(card).data.library_name == "vitreg"


def test_the_card_of_a_model_as_it_was(tmp_path):
    vit = vitreg.load("vitreg_tiny")
    diagnosis = vitreg.diagnose(vit, bundled_photographs())
    save_repository(vit, tmp_path / "a", "user/tiny", findings=diagnosis, license="mit")
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"' in card
    assert "- Nothing: these are the weights as they were." in card
    assert re.search(r"!\[.*\]\(diagnosis.png\)", card)
    assert vitreg.load(str(tmp_path / "a")).config == vit.config


def test_findings_of_another_model_are_refused(tmp_path, tiny_vit, fixed, photograph_batch):
    diagnosis = vitreg.diagnose(tiny_vit, photograph_batch)
    with pytest.raises(ValueError, match=r"the findings are of vit_tiny.*with other changes than this model"):
        save_repository(fixed, tmp_path, "user/a", findings=diagnosis)


def test_the_folder_of_checkpoints_holds_repositories_too(tmp_path, monkeypatch, fixed):
    save_repository(fixed, tmp_path / "user--vit-fixed", "user/vit-fixed")
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(tmp_path))
    assert vitreg.load("user/vit-fixed").config == fixed.config


def test_without_a_token(hub, monkeypatch, fixed):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(
        ValueError, match=r"publishing user/a needs a token of the hub: run `hf auth login`, set HF_TOKEN"
    ):
        vitreg.push_to_hub(fixed, "user/a")
    assert not hub[1]
    vitreg.push_to_hub(fixed, "user/a", token="hf_other")


def test_without_a_network(monkeypatch, fixed):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"could not publish user/a: .*save_repository writes the same files"
    ) as caught:
        vitreg.push_to_hub(fixed, "user/a")
    assert "\n" not in str(caught.value)


def test_a_repository_of_transformers_is_still_asked_of_transformers(hub):
    root, asked = hub
    (root / "user/theirs").mkdir(parents=True)
    (root / "user/theirs/config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(vitreg.CheckpointError, match="could not get user/theirs"):
        vitreg.load("user/theirs")
    assert {keywords["filename"] for _, keywords in asked} == {"config.json"}  # no weights
