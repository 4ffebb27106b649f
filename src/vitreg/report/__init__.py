"""What people look at: the HTML report and the figures. Draws plain data, imports no other part of vitreg."""

from vitreg.report.attention import attention_figure, overlay, write_attention
from vitreg.report.comparisons import write_comparisons
from vitreg.report.discovery import discovery_overlay, sweep_figure
from vitreg.report.evaluation import DenseImage, Table, write_evaluation
from vitreg.report.examples import ExampleMaps
from vitreg.report.figures import comparison_figure, diagnosis_figure
from vitreg.report.interactive import write_comparison, write_report
from vitreg.report.side_by_side import Panels, Photograph, write_side_by_side
from vitreg.report.side_by_side_figure import side_by_side_figure
from vitreg.report.timeline import timeline_figure

__all__ = [
    "DenseImage",
    "ExampleMaps",
    "Panels",
    "Photograph",
    "Table",
    "attention_figure",
    "comparison_figure",
    "diagnosis_figure",
    "discovery_overlay",
    "overlay",
    "side_by_side_figure",
    "sweep_figure",
    "timeline_figure",
    "write_attention",
    "write_comparison",
    "write_comparisons",
    "write_evaluation",
    "write_report",
    "write_side_by_side",
]
