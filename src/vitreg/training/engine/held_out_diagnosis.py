"""Diagnosing a model in training on images that it does not train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitreg.artifacts import diagnose
from vitreg.images import ImageSet, ImageStream, Subset, spaced_indices
from vitreg.model import VisionTransformer
from vitreg.training.engine.config import TrainingConfig
from vitreg.training.engine.method import ExtraModules, Method

BATCH_SIZE = 64
NUM_EVALUATED = 1000
# What a diagnosis says of its images rather than of the model.
LEFT_OUT = ("skipped", "position_frequency", "interrupted", "version")


class HeldOutDiagnosis:
    """Records when artifacts appear; all diagnoses look at the same of the images."""

    def __init__(self, config: TrainingConfig, images: ImageSet, device: torch.device) -> None:
        self._config, self._images, self._device = config, images, device
        self._some = Subset(images, spaced_indices(len(images), NUM_EVALUATED))
        self._kept: list[Tensor] = []

    def read(self) -> None:
        """Read the images that are diagnosed, before any work is done.

        Raises:
            ValueError: none of them can be read.
        """
        preprocess = self._config.model.preprocess
        chosen = spaced_indices(len(self._images), self._config.num_diagnosed).tolist()
        stream = ImageStream(self._images, preprocess, numbers=chosen, batch_size=BATCH_SIZE, device=self._device)
        self._kept = [batch.images for batch in stream]
        if not self._kept:
            raise ValueError(f"none of the held-out images of {self._images.source} can be read; give others by --val")

    def look(
        self, method: Method, vit: VisionTransformer, extra_modules: ExtraModules, *, final: bool
    ) -> dict[str, Any]:
        """What `diagnose` says of the model, as JSON types, with the method's `metrics`; after `read`.

        Args:
            method: of the run.
            vit: the model as it would be saved, on the CPU before and after.
            extra_modules: and what goes with it.
            final: evaluate on all images, instead of `NUM_EVALUATED` of them.
        """
        vit.to(self._device)
        diagnosis = diagnose(vit, iter(self._kept), max_examples=1).to_dict()
        found = {key: value for key, value in diagnosis.items() if key not in LEFT_OUT}
        metrics = method.evaluate(vit, extra_modules, self._images if final else self._some, BATCH_SIZE)
        vit.cpu()
        return {"metrics": metrics, **found}
