"""What a recipe trains, and what it makes of an image: the two things in which recipes differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn

from vitreg.images import ImageSet
from vitreg.model import VisionTransformer

Batch = dict[str, Tensor]
"""What one step trains on, by name; until `Augmentation.collate`, the first axis is the images, in order."""


ExtraModules = Mapping[str, dict[str, Tensor]]
"""The weights of modules that are saved beside a model, by file name."""


@dataclass(frozen=True)
class Sample:
    """An image, RGB and upright, and what is known of it: its class, sentences about it, its place in the set."""

    image: Image.Image
    label: int | None = None
    captions: tuple[str, ...] = ()
    index: int = 0


class Augmentation(ABC):
    """Turns samples into a batch, in worker processes.

    Randomness is taken from the global generators of Python, NumPy and PyTorch, which are seeded for every sample, and
    again for every pair, from the run's seed and the place in the order of the run. So an image is augmented and mixed
    the same way however many workers, processes, micro-batches and interruptions there are.
    """

    @abstractmethod
    def __call__(self, sample: Sample) -> Batch:
        """The tensors of one image, without a batch axis."""

    def mix(self, pair: Batch) -> Batch:
        """The tensors `[2, ...]` of two neighbors, which may be mixed with each other."""
        return pair

    def collate(self, batch: Batch) -> Batch:
        """What a process trains on at a time; here is counted what would make it wait for the device."""
        return batch


class Method(nn.Module, ABC):
    """A model in training with whatever it needs beside it, such as a teacher, heads or a text tower.

    Attributes:
        vit: the Vision Transformer that learns.
    """

    vit: VisionTransformer

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Scalars: `loss`, the mean over the batch, and what else is worth logging.

        Args:
            batch: this process's part of the global batch.
            progress: the part of the training that is done, 0 to 1, for schedules.
        """

    def after_step(self, progress: float) -> None:
        """What follows an optimizer step, such as moving a teacher."""

    @property
    def export_model(self) -> VisionTransformer:
        """The model that a run is for: what is diagnosed and saved. The student, unless there is a teacher."""
        return self.vit

    def extra_modules(self) -> dict[str, nn.Module]:
        """Modules that are saved beside the product, by file name, such as CLIP's text tower.

        Their attribute `metadata`, texts by name, goes into the file.
        """
        return {}

    def evaluate(
        self, vit: VisionTransformer, extra_modules: ExtraModules, images: ImageSet, batch_size: int
    ) -> dict[str, float]:
        """Figures of merit on held-out images, such as top-1 accuracy in percent; may be none.

        Args:
            vit: the product as it would be saved, in evaluation mode.
            extra_modules: and the weights of what would be saved beside it, all on this process.
            images: images that were not trained on.
            batch_size: images at a time.
        """
        return {}
