"""Models that are not converted, looked at by hooks in their own code."""

from vitreg.checkpoints.observed.loading import can_be_observed, convert_or_observe, load_or_observe
from vitreg.checkpoints.observed.observe import observe
from vitreg.checkpoints.observed.observed_vit import ObservedViT

__all__ = ["ObservedViT", "can_be_observed", "convert_or_observe", "load_or_observe", "observe"]
