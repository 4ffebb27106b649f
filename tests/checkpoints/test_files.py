"""Weights from files: damaged, foreign and hostile ones."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitreg import CheckpointError
from vitreg.checkpoints.files import read_weights

WEIGHTS = {"cls_token": torch.randn(1, 1, 64), "patch_embed.proj.weight": torch.randn(64, 3, 16, 16)}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Armed:
    """Unpickling runs this."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: {"model": WEIGHTS, "args": a},
                                  lambda a: {"model": WEIGHTS, "args": argparse.Namespace(x=a)}],
                         ids=["alone", "beside weights", "in a Namespace"])  # fmt: skip
def test_code_in_a_pickle_does_not_run(tmp_path, wrap, zipped):
    file, trace = tmp_path / "model.pth", tmp_path / "ran"
    torch.save(wrap(Armed(trace)), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model\.pth holds Python objects besides tensors.*\.safetensors"):
        read_weights(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # the pickle was armed


def test_code_in_a_plain_pickle_does_not_run(tmp_path):
    file, trace = tmp_path / "model.pth", tmp_path / "ran"
    file.write_bytes(pickle.dumps(Armed(trace), protocol=2))
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        read_weights(file)
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_training_scripts_keep_their_arguments_beside_the_weights(tmp_path, suffix, zipped):
    file = tmp_path / f"checkpoint{suffix}"
    content = {
        "model": WEIGHTS,
        "args": argparse.Namespace(lr=1e-3, blr=None),
        "epoch": 7,
        "scaler": {"scale": 1.0},
    }
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    state, metadata = read_weights(file)
    same(state, WEIGHTS)
    assert metadata == {}


def test_safetensors_come_with_their_metadata(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file, {"architecture": "vit_tiny_patch16_224"})
    state, metadata = read_weights(file)
    same(state, WEIGHTS)
    assert metadata == {"architecture": "vit_tiny_patch16_224"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_says_download_again(tmp_path, suffix, part):
    file = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(WEIGHTS, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=rf"model\{suffix}.*download it again") as caught:
        read_weights(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_truncated_legacy_file(tmp_path, part):
    file = tmp_path / "model.pth"
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=r"model\.pth.*download it again"):
        read_weights(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 22883188\n",
        b"<!DOCTYPE html>",
        b"Entry not found",
    ],
    ids=["git-lfs pointer", "html", "text"],
)
def test_text_in_place_of_weights(tmp_path, suffix, content):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\{suffix}.*download it again"):
        read_weights(file)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match=r"is not a file; give a \.safetensors or \.pth file"):
            read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1}, torch.zeros(3), {1: torch.zeros(3)}], ids=repr)
def test_a_file_without_weights(tmp_path, content):
    file = tmp_path / "other.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"other\.pt holds no state dict"):
        read_weights(file)
