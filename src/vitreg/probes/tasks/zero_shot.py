"""Zero-shot classification with CLIP and SigLIP: the class whose sentences are nearest to an image.

The embedding of a class is the mean of its normalized sentence embeddings, normalized again, as open_clip's
`build_zero_shot_classifier` makes it; an image's is what the model's own pooling and projection make of it. Scale and
bias of the logits do not change which class is first, so there are only cosines here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.common.progress import OnProgress
from vitreg.model import VisionTransformer
from vitreg.probes.protocols import ZeroShotConfig
from vitreg.probes.results.score import ProbeResult, Score
from vitreg.probes.store.feature_store import FeatureStore
from vitreg.probes.store.origin import StoredModel
from vitreg.probes.tasks.classes import check_finite
from vitreg.probes.tasks.templates import class_names, sentences
from vitreg.probes.tasks.text_encoders import TextEncoder


def zero_shot(
    val: FeatureStore,
    vit: VisionTransformer,
    text: TextEncoder,
    names: Sequence[str] | None = None,
    config: ZeroShotConfig = ZeroShotConfig(),
    *,
    on_progress: OnProgress | None = None,
) -> ProbeResult:
    """Classify images by sentences alone; nothing is trained.

    Args:
        val: features of labeled images.
        vit: the model they are of; its projection is applied to them.
        text: the text tower that was trained beside it (`load_text_encoder`).
        names: of the classes, in the order of the labels; by default those of the images (`class_names`).
        config: how classes are put into words.
        on_progress: called with the number of classes done and their total.

    Raises:
        ValueError: the images have no labels, the names are no words or too few, the features are of another model,
            or the text tower has another width.
    """
    labels = val.labels
    if labels is None:
        raise ValueError(f"{val.path} has no labels; zero-shot classification needs images with classes")
    names = class_names(val.classes) if names is None else tuple(names)
    if len(names) != len(val.classes):
        raise ValueError(f"{len(names)} class names are given, but {val.data.source} has {len(val.classes)} classes")
    images = image_embeddings(val, vit)
    classes = class_embeddings(text, names, config, on_progress).cpu()
    if images.shape[1] != classes.shape[1]:
        raise ValueError(
            f"{val.model.name} embeds images in {images.shape[1]} dimensions and the text tower sentences in "
            f"{classes.shape[1]}; give the text tower of the same model"
        )
    check_finite(images, f"an embedding of {val.path}")
    check_finite(classes, "the embedding of a class")
    best = (images @ classes.T).topk(min(5, len(names))).indices
    right = best == labels.unsqueeze(1)
    scores = [Score.mean("zero-shot top-1", right[:, 0].numpy(), unit="%")]
    if len(names) > 5:
        scores.append(Score.mean("zero-shot top-5", right.any(1).numpy(), unit="%"))
    else:
        scores.append(Score.none("zero-shot top-5", f"there are only {len(names)} classes", unit="%"))
    details = {
        "images": len(right),
        "classes": len(names),
        "templates": config.templates if isinstance(config.templates, str) else list(config.templates),
        "first names": list(names[:5]),
    }
    return ProbeResult("zero-shot", tuple(scores), details)


@torch.inference_mode()
def image_embeddings(store: FeatureStore, vit: VisionTransformer) -> Float[Tensor, "N E"]:
    """The images' normalized embeddings, from what the pooling of their model made of them; of no other model."""
    if StoredModel.of(vit).digest != store.model.digest:
        raise ValueError(f"{store.path} holds features of another model, {store.model}; give that model")
    pooled = store.pooled
    if vit.head is not None:
        head = vit.head
        pooled = head(pooled.to(head.weight)).float().cpu()
    return F.normalize(pooled, dim=-1)


@torch.inference_mode()
def class_embeddings(
    text: TextEncoder, names: Sequence[str], config: ZeroShotConfig, on_progress: OnProgress | None = None
) -> Float[Tensor, "C E"]:
    """A normalized embedding of every class."""
    found: list[Tensor] = []
    for name in names:
        embeddings = F.normalize(text.encode(sentences(config.templates, name)), dim=-1)
        found.append(F.normalize(embeddings.mean(0), dim=0))
        if on_progress is not None:
            on_progress(len(found), len(names))
    return torch.stack(found)
