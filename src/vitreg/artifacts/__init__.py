"""The problem: patches that a model turned into scratch memory."""

from vitreg.artifacts.compare import compare, compare_each
from vitreg.artifacts.comparison import BlockChange, Comparison
from vitreg.artifacts.conclusion import check_block, choose_thresholds, conclude
from vitreg.artifacts.diagnosis import BlockNorms, Diagnosis, NeighbourSimilarity
from vitreg.artifacts.histogram import LogAxis
from vitreg.artifacts.observer import diagnose, model_card
from vitreg.artifacts.outcome import REMOVED
from vitreg.artifacts.outliers import OutlierNorms, find_outliers, outlier_norms
from vitreg.artifacts.planted import plant_artifacts
from vitreg.artifacts.statistics import NormStatistics, neighbour_similarity
from vitreg.artifacts.threshold import parse_rule, two_modes
from vitreg.artifacts.verdict import write_advice

__all__ = [
    "REMOVED",
    "BlockChange",
    "BlockNorms",
    "Comparison",
    "Diagnosis",
    "LogAxis",
    "NeighbourSimilarity",
    "NormStatistics",
    "OutlierNorms",
    "check_block",
    "choose_thresholds",
    "compare",
    "compare_each",
    "conclude",
    "diagnose",
    "find_outliers",
    "model_card",
    "neighbour_similarity",
    "outlier_norms",
    "parse_rule",
    "plant_artifacts",
    "two_modes",
    "write_advice",
]
