"""Real photographs with captions, and the smallest towers, for the tests of CLIP."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

from vitreg.images import ImageSet, read_image
from vitreg.training.recipes.clip import CLIP, CLIPConfig
from vitreg.training.recipes.sizes import sized

MODEL = sized(
    "micro", patch_size=16, image_size=64, num_registers=4, depth=2, embed_dim=64, num_classes=32, head_bias=False
)
CONFIG = CLIPConfig(text_width=32, text_layers=2, text_heads=2, context_length=24)


class Photographs(ImageSet):
    """A folder with `images/` and a `captions.csv`."""

    def __init__(self, folder: Path, num: int) -> None:
        self.source = str(folder)
        sentences: dict[str, list[str]] = {}
        with (folder / "captions.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                sentences.setdefault(row["image"], []).append(row["caption"])
        self.files = [folder / "images" / name for name in sorted(sentences)[:num]]
        self.sentences = {index: tuple(sentences[path.name]) for index, path in enumerate(self.files)}

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        return read_image(self.files[index])

    def name(self, index: int) -> str:
        return self.files[index].name

    def captions(self, index: int) -> tuple[str, ...]:
        return self.sentences[index]


def tiny_method() -> CLIP:
    """Small towers."""
    return CLIP(MODEL, CONFIG)
