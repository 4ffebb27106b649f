"""The evidence: what tokens know, and what clean features are worth."""

from typing import TYPE_CHECKING

from vitreg.common.lazy import lazy

if TYPE_CHECKING:
    from vitreg.probes.store.diagnosis import diagnose_store
    from vitreg.probes.store.extract import FeaturesConfig, extract
    from vitreg.probes.store.feature_store import FeatureStore, open_store

__all__ = ["FeatureStore", "FeaturesConfig", "diagnose_store", "extract", "open_store"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "store.extract": ["FeaturesConfig", "extract"],
        "store.feature_store": ["FeatureStore", "open_store"],
        "store.diagnosis": ["diagnose_store"],
    },
)
