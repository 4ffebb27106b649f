"""Shards on a local Ray of two workers, one of which is killed."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import vitreg
from probes.small import small_vit
from vitreg.probes import FeaturesConfig
from vitreg.probes.store.on_ray import Ray, map_on_ray

CONFIG = FeaturesConfig(dtype="float32", shard_size=4)


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_without_ray_it_is_said_what_to_install(test_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs Ray; install it with: pip install 'vitreg\[scale\]'"):
        vitreg.extract(small_vit(), test_data / "coco128" / "images", tmp_path / "store", CONFIG, ray=Ray(2))
    with pytest.raises(ValueError, match="num_workers is 0"):
        Ray(0)


@pytest.mark.slow
def test_the_bytes_are_those_of_one_process(photographs, tmp_path):
    pytest.importorskip("ray")
    vit, folder = small_vit(), tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(photographs[:10]):
        os.link(path, folder / f"{number}.jpg")
    told: list[int] = []
    vitreg.extract(vit, folder, tmp_path / "one", CONFIG)
    store = vitreg.extract(
        vit, folder, tmp_path / "ray", CONFIG, ray=Ray(2), on_progress=lambda done, _: told.append(done)
    )
    assert len(store) == told[-1] == 10
    assert files(tmp_path / "one") == files(tmp_path / "ray")


def killed_once(folder: Path):
    def compute(index: int) -> int:
        with (folder / f"{index}.log").open("a") as log:
            log.write("begun\n")
        if index == 3 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1

    return compute


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_shard_only(tmp_path):
    pytest.importorskip("ray")

    make = partial(killed_once, tmp_path)
    done: list[int] = []
    map_on_ray(
        make, range(8), Ray(2), device=torch.device("cpu"), total=8, done=0,
        on_progress=lambda count, _: done.append(count),
    )  # fmt: skip
    assert done == list(range(1, 9))
    assert {path.stem: path.read_text().count("begun") for path in tmp_path.glob("*.log")} == {
        str(index): 1 + (index == 3) for index in range(8)
    }
