"""The evidence: what tokens know, and what clean features are worth."""

from typing import TYPE_CHECKING

from vitreg.lazy import lazy

if TYPE_CHECKING:
    from vitreg.probes.features import FeaturesConfig, extract
    from vitreg.probes.store import FeatureStore

__all__ = ["FeatureStore", "FeaturesConfig", "extract"]
__getattr__, __dir__ = lazy(__name__, {"features": ["FeaturesConfig", "extract"], "store": ["FeatureStore"]})
