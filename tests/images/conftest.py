import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(os.environ.get("VITREG_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Twenty small JPEGs of 40 x 30 whose red says which one it is: 10, 20, ... 200."""
    folder = tmp_path / "photos"
    folder.mkdir()
    files = [folder / f"{index}.jpg" for index in range(20)]
    for index, file in enumerate(files):
        Image.new("RGB", (40, 30), (10 + 10 * index, 0, 0)).save(file, quality=95)
    return files


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))


@pytest.fixture
def coco128() -> Path:
    if not (folder := DATA / "coco128").is_dir():
        pytest.skip(f"no photos in {DATA}; set VITREG_TEST_DATA")
    return folder
