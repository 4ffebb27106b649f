"""A small labeled set of real images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def class_folders(test_data: Path, tmp_path_factory) -> Path:
    """Four classes of tiny-imagenet-100: `train` with 60 images of 64 pixels and `val` with 12. Do not change it."""
    import pyarrow.parquet as parquet

    folder = tmp_path_factory.mktemp("classes")
    for part, each in (("train", 15), ("val", 3)):
        rows = parquet.read_table(test_data / "tiny-imagenet-100" / f"{part}.parquet", filters=[("label", "<", 4)])
        for label in range(4):
            of_class = rows.filter(parquet.filters_to_expression([("label", "=", label)])).slice(0, each)
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for i, row in enumerate(of_class["image"].to_pylist()):
                (place / f"{i}.jpg").write_bytes(row["bytes"])
    return folder


@pytest.fixture
def folders(class_folders: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged; a file is replaced rather than written into."""
    return Path(shutil.copytree(class_folders, tmp_path / "data", copy_function=os.link))


@pytest.fixture
def _quick(monkeypatch):
    """Runs inside the tests do without the half second in which the machine is measured."""
    monkeypatch.setattr("vitreg.training.engine.run_logger.matrix_rate", lambda device, dtype: 1e9)
