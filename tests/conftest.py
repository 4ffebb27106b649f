"""Fixtures of all tests; shapes in signatures are checked while they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

assert "vitreg" not in sys.modules
install_import_hook("vitreg", "beartype.beartype")

ROOT = Path(__file__).parents[1]
TINY_VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where the tests in tests/cuda run; by default on a GPU, or not at all")


def pytest_configure() -> None:
    # Tests are tiny and run side by side: threads of their own would fight for the cores.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test leaves anything in the user's cache, or finds something there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITREG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real photographs and weights, which is not part of the repository."""
    folder = Path(os.environ.get("VITREG_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is not a folder (set VITREG_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def _tiny_vit(test_data: Path):
    import vitreg

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))
        return vitreg.load(TINY_VIT)


@pytest.fixture
def tiny_vit(_tiny_vit):
    """The real supervised ViT-Ti/16 (AugReg), pretrained. Shared: do not change it."""
    return _tiny_vit


@pytest.fixture(scope="session")
def photographs(test_data: Path) -> list[Path]:
    """32 ImageNet photographs of 32 classes."""
    return sorted((test_data / "imagenet-samples").glob("*.jpg"))[::31][:32]


@pytest.fixture(scope="session")
def photograph_batch(_tiny_vit, photographs: list[Path]) -> torch.Tensor:
    """Those photographs as the ViT-Ti wants them."""
    from PIL import Image

    return torch.stack([_tiny_vit.preprocess(Image.open(path)) for path in photographs])
