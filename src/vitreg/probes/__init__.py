"""The evidence: what tokens know, and what clean features are worth."""

from vitreg.probes.features import FeaturesConfig, extract
from vitreg.probes.store import FeatureStore

__all__ = ["FeatureStore", "FeaturesConfig", "extract"]
