"""Finding captions by images and images by captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.checkpoints.text_tower import TextTower
from vitreg.images import ImageSet, ImageStream
from vitreg.model import VisionTransformer

MAX_IMAGES = 1000
"""What Flickr30k's and COCO's customary test sets hold; recall falls with the number of images to choose from."""


@torch.inference_mode()
def retrieval(vit: VisionTransformer, tower: TextTower, images: ImageSet, batch_size: int) -> dict[str, float]:
    """Recall at 1 and 5 in percent, both ways, on the first `MAX_IMAGES` images with all of their captions.

    Images that cannot be read or have no caption do not count; without any there are no figures.
    """
    device = next(vit.parameters()).device
    captioned = [index for index in range(min(len(images), MAX_IMAGES)) if images.captions(index)]
    features: list[Tensor] = []
    captions: list[str] = []
    owners: list[int] = []
    for batch in ImageStream(images, vit.preprocess, numbers=captioned, batch_size=batch_size, device=device):
        features.append(F.normalize(vit.classify(batch.images).float(), dim=-1))
        for number in batch.numbers:
            sentences = images.captions(number)
            owners += [1 + owners[-1] if owners else 0] * len(sentences)
            captions += sentences
    if not captions:
        return {}
    tokens = tower.tokenize(captions).to(device).split(batch_size)
    texts = torch.cat([F.normalize(tower(part).float(), dim=-1) for part in tokens])
    return recall(torch.cat(features) @ texts.T, torch.tensor(owners, device=device))


def recall(similarity: Float[Tensor, "I C"], owners: Int[Tensor, " C"]) -> dict[str, float]:
    """R@1 and R@5 in percent.

    An image is right at k if any of its captions is among its k most similar ones; a caption, if its image is among
    the k most similar images (Karpathy and Fei-Fei, arXiv 1412.2306).

    Args:
        similarity: of images and captions.
        owners: number of the image that each caption is about.
    """
    images = torch.arange(len(similarity), device=similarity.device)
    figures = {}
    for k in (1, 5):
        captions = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
        figures[f"image_to_text_r{k}"] = (owners[captions] == images[:, None]).any(1)
        best = similarity.topk(min(k, similarity.shape[0]), dim=0).indices
        figures[f"text_to_image_r{k}"] = (best == owners).any(0)
    return {name: 100 * int(right.sum()) / len(right) for name, right in figures.items()}
