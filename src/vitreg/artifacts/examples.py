"""A few images kept whole, to look at."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.artifacts.diagnosis import ChannelShare
from vitreg.checkpoints import ObservedViT
from vitreg.model import Query, Trace, VisionTransformer
from vitreg.report import ExampleMaps

NUM_CHANNELS = 8
"""Channels listed by `channel_shares`."""

NUM_LARGEST = 8
"""Patches of each example whose channels are looked at."""


class Examples:
    """The first images of a diagnosis with their norm and attention maps.

    Args:
        vit: the model that is diagnosed.
        most: how many to keep.
    """

    def __init__(self, vit: VisionTransformer | ObservedViT, most: int) -> None:
        self._vit, self._most = vit, most
        self.maps: list[ExampleMaps] = []
        self._largest: list[Float[Tensor, "depth B K D"]] = []

    def queries(self) -> list[Query]:
        """Whose attention the next batch should record: the class token first, registers while examples are kept."""
        if isinstance(self._vit, ObservedViT) and self._vit.config.no_attention:
            return []
        queries: list[Query] = ["cls"] if self._vit.config.class_token else []
        if self._vit.num_registers and len(self.maps) < self._most:
            queries.append("registers")
        return queries

    def num_largest(self) -> int:
        """Of how many patches the next batch should keep the hidden states."""
        return NUM_LARGEST if len(self.maps) < self._most else 0

    def add(self, trace: Trace, batch: Float[Tensor, "B 3 H W"], names: list[str]) -> None:
        """Keep the first images of a batch while there is room."""
        room = min(self._most - len(self.maps), len(batch))
        if room <= 0:
            return
        photos = self._vit.preprocess.unnormalize(batch[:room]).permute(0, 2, 3, 1).cpu()
        if isinstance(self._vit, ObservedViT):  # a still image is seen at every time
            photos = photos.repeat(1, self._vit.config.time_steps, 1, 1)
        attention = trace.attention.to_patches.mean(2).float().cpu().numpy() if trace.attention else None
        if trace.largest is not None:
            self._largest.append(trace.largest[:, :room].float().cpu())
        for i in range(room):
            self.maps.append(
                ExampleMaps(
                    name=names[i],
                    photo=photos[i].numpy(),
                    norms=trace.patch_norms[:, i].cpu().numpy(),
                    attention={}
                    if attention is None or trace.attention is None
                    else {query: attention[:, i, q] for q, query in enumerate(trace.attention.queries)},
                    register_norms=trace.register_norms[:, i].cpu().numpy() if self._vit.num_registers else None,
                    cls_norms=None if trace.cls_norms is None else trace.cls_norms[:, i].cpu().numpy(),
                )
            )

    def channel_shares(self, block: int, threshold: float | None) -> tuple[ChannelShare, ...]:
        """The channels that carry the outliers' squared norm after a block, with their shares, largest first.

        Massive activations sit in the same few channels in every image (Sun et al., arXiv 2402.17762). Taken from the
        largest patches of the examples; empty where these hold no outlier.
        """
        if threshold is None or not self._largest:
            return ()
        patches = torch.cat([largest[block].flatten(0, 1) for largest in self._largest]).cpu().double()
        outliers = patches[patches.norm(dim=-1) >= threshold]
        if not len(outliers):
            return ()
        total = outliers.square().sum(0)
        shares, channels = (total / total.sum()).topk(min(NUM_CHANNELS, len(total)))
        return tuple(ChannelShare(int(c), round(float(s), 4)) for c, s in zip(channels, shares, strict=True))
