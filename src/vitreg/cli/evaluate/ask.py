"""Between the commands that ask probes and what asks them, which imports PyTorch."""

from __future__ import annotations

from typing import Any

from vitreg.cli.evaluate.options import EvaluationData, EvaluationOptions


def ask(options: EvaluationOptions, data: EvaluationData, **probes: Any) -> int:
    """Ask probes, by their names with their protocols, of all models; by default all that can be asked."""
    from vitreg.cli.evaluate.run import run_evaluation

    return run_evaluation(options, {name.replace("_", "-"): protocol for name, protocol in probes.items()}, data)
