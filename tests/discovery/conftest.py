"""Feature maps of real images, of every facet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vitreg.discovery.discover import pad
from vitreg.discovery.features import FACETS, patch_features


@pytest.fixture(scope="session")
def photos(test_data):
    """The 128 images of coco128, with 256 pixels along the longer side."""
    found = []
    for path in sorted((test_data / "coco128" / "images").glob("*.jpg")):
        image = Image.open(path)
        image.thumbnail((256, 256))
        found.append(image.convert("RGB"))
    return found


@pytest.fixture(scope="session")
def feature_maps(_tiny_vit, photos):
    """(features by facet, grid) of 126 images, from the last block of the ViT-Ti."""
    found = []
    for image in photos[:126]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        images = pad(_tiny_vit.preprocess.normalize(pixels), 16)
        features = patch_features(_tiny_vit, images, FACETS, [-1])
        grid = (images.shape[-2] // 16, images.shape[-1] // 16)
        found.append(({facet: features[facet, -1][0] for facet in FACETS}, grid))
    return found
