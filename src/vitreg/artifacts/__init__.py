"""The problem: patches that a model turned into scratch memory."""

from vitreg.artifacts.compare import compare
from vitreg.artifacts.comparison import BlockChange, Comparison
from vitreg.artifacts.diagnosis import BlockNorms, Diagnosis, NeighbourSimilarity
from vitreg.artifacts.observer import diagnose
from vitreg.artifacts.outcome import REMOVED
from vitreg.artifacts.outliers import OutlierNorms, find_outliers
from vitreg.artifacts.planted import plant_artifacts
from vitreg.artifacts.statistics import neighbour_similarity
from vitreg.artifacts.threshold import two_modes

__all__ = [
    "REMOVED",
    "BlockChange",
    "BlockNorms",
    "Comparison",
    "Diagnosis",
    "NeighbourSimilarity",
    "OutlierNorms",
    "compare",
    "diagnose",
    "find_outliers",
    "neighbour_similarity",
    "plant_artifacts",
    "two_modes",
]
