"""What a feature store says when it is not what it should be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitreg
from probes.small import BLOCKS, small_vit, validation
from vitreg.probes import FeatureStore, extract


@pytest.fixture(scope="session")
def _finished(test_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    extract(small_vit(), validation(test_data, 20), out, BLOCKS)
    return out


@pytest.fixture
def finished(_finished, tmp_path) -> Path:
    """A store of twenty images in three files."""
    return Path(shutil.copytree(_finished, tmp_path / "store"))


def shard_of(store: Path, index: int) -> Path:
    (shard,) = store.glob(f"shards/shard-{index:06d}-*.parquet")
    return shard


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        FeatureStore.open(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_store(tmp_path):
    refused(tmp_path / "nowhere", "nowhere holds no feature store .* run the feature pass")


def test_a_store_is_read_where_nothing_can_be_written(finished, test_data):
    """Also by a pass, which finds that nothing is left to do."""
    vit = small_vit()
    (finished / ".lock").unlink()
    finished.chmod(0o555)
    try:
        assert FeatureStore.open(finished).num_images == 20
        assert extract(vit, validation(test_data, 20), finished, BLOCKS).num_images == 20
        assert not (finished / ".lock").exists()
    finally:
        finished.chmod(0o755)


def test_a_manifest_that_is_damaged_or_something_else(finished):
    manifest = finished / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:100])
    refused(finished, "manifest.json cannot be read")
    manifest.write_text(json.dumps({**json.loads(whole), "origin": {}}))
    refused(finished, "manifest.json is damaged")
    manifest.write_text('{"format": "vitreg-run/1"}')
    refused(finished, r"manifest.json is not of a feature store \(format vitreg-features/2\)")


def test_a_shard_that_is_cut_off_or_missing(finished):
    shard = shard_of(finished, 1)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(finished, r"shard-000001-\w+.parquet is damaged or missing .* delete it and run the feature pass again")
    shard.unlink()
    refused(finished, r"shard-000001-\w+.parquet is damaged or missing")


def test_a_shard_of_another_store_or_place(finished, test_data, tmp_path):
    shard = shard_of(finished, 1)
    shutil.copy(shard_of(finished, 0), shard)
    refused(finished, r"shard-000001-\w+.parquet belongs to another store")
    extract(small_vit(seed=1), validation(test_data, 20), tmp_path / "other", BLOCKS)
    shutil.copy(shard_of(tmp_path / "other", 1), shard)
    refused(finished, r"shard-000001-\w+.parquet belongs to another store")


def test_a_pass_does_not_build_on_a_damaged_shard(finished, test_data):
    manifest = json.loads((finished / "manifest.json").read_text())
    (finished / "manifest.json").write_text(json.dumps({**manifest, "finding": None}))
    shard_of(finished, 2).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"shard-000002-\w+.parquet is damaged .* delete it and run"):
        extract(small_vit(), validation(test_data, 20), finished, BLOCKS)
    shard_of(finished, 2).unlink()
    assert extract(small_vit(), validation(test_data, 20), finished, BLOCKS).num_images == 20


def test_a_block_that_was_not_kept(finished):
    store = FeatureStore.open(finished)
    assert store.blocks == (0, 2)
    for ask in (store.cls, store.registers, store.mean_patch, store.patches):
        with pytest.raises(ValueError, match="holds no tokens of block -2, only of 0, 2; run another feature pass"):
            ask(-2)


def test_stores_of_one_model_go_together(finished, test_data, tmp_path):
    train = FeatureStore.open(finished)
    train.check_same_model(extract(small_vit(), validation(test_data, 4), tmp_path / "val"))
    other = extract(small_vit(seed=1), validation(test_data, 4), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds features of another model: small .*, not small"):
        train.check_same_model(other)
    wide = vitreg.Preprocess(size=(64, 96))
    wider = extract(small_vit(), validation(test_data, 4), tmp_path / "wide", preprocess=wide)
    with pytest.raises(ValueError, match=r"wide holds features of another preprocessing: size \(64, 96\)"):
        train.check_same_model(wider)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_processes_do_not_write_to_one_store(test_data, tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    holding = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", holding, os.fspath(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"another process computes features in .*store; wait for it, or stop it"):
            extract(small_vit(), validation(test_data, 4), folder)
        other.communicate(b"\n")
    assert extract(small_vit(), validation(test_data, 4), folder).num_images == 4
