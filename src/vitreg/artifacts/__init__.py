"""The problem: patches that a model turned into scratch memory."""

from vitreg.artifacts.diagnosis import BlockNorms, Diagnosis, NeighbourSimilarity
from vitreg.artifacts.observer import diagnose
from vitreg.artifacts.statistics import neighbour_similarity
from vitreg.artifacts.threshold import two_modes

__all__ = ["BlockNorms", "Diagnosis", "NeighbourSimilarity", "diagnose", "neighbour_similarity", "two_modes"]
