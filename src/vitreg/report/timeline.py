"""The image of when artifacts appear: norms by block, by training step and by model (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreg.common.words import counted, shorten
from vitreg.report.colors import OUTLIER, ColorScale
from vitreg.report.norm_axes import (
    DASHES,
    MEDIAN,
    REGISTER,
    Block,
    colors,
    draw_column,
    draw_registers,
    mark,
    norm_axis,
    norm_limits,
    share_axis,
    share_scale,
)
from vitreg.report.sheet import MARGIN, QUIET, TITLE, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = Mapping[str, Any]

MOST_COLUMNS = 4
# Inches.
WIDTHS = {1: 5.8, 2: 3.5, 3: 2.8, 4: 2.4}
HEIGHT, STRIP, APART = 2.1, 0.6, 0.1
LINE, HEADING, NAMES, LABELS = 0.21, 0.3, 0.38, 0.58
LEFT, BETWEEN, COLUMN, SIDE = 0.76, 0.22, 0.42, 2.1
PANEL = {"fontsize": 10, "fontweight": "bold"}
NAME = {"fontsize": 8.5, "fontweight": "bold"}


class _Layout:
    """Where things lie: runs in rows of panel (a), the same rows of panel (b) below, and at the right what they share.

    Args:
        num_runs: at least one.
        repeated: whether panel (b) names the runs again, because not every one lies right below its name in panel (a).

    Attributes:
        top, middle: of panels (a) and (b).
        right, side: the left of panel (c) and of the legend, and their width.
    """

    def __init__(self, num_runs: int, repeated: bool) -> None:
        self.columns = min(num_runs, MOST_COLUMNS)
        rows = -(-num_runs // self.columns)
        self.width = WIDTHS[self.columns]
        self.names = NAMES / 2 if repeated else 0.0
        self._block_row = NAMES + HEIGHT + LABELS
        self._step_row = self.names + HEIGHT + APART + STRIP + LABELS
        self.top = 0.55 + LINE * num_runs
        self.middle = self.top + HEADING + rows * self._block_row
        self.right = LEFT + self.columns * (self.width + BETWEEN) + 0.55
        self.side = max(COLUMN * num_runs, SIDE)
        self.sheet = Sheet(self.right + self.side + 2 * MARGIN, self.middle + HEADING + rows * self._step_row)

    def cells(self, run: int) -> tuple[float, float, float]:
        """The left of a run's cells, and their top in panels (a) and (b)."""
        row, column = divmod(run, self.columns)
        top, middle = self.top + HEADING + row * self._block_row, self.middle + HEADING + row * self._step_row
        return LEFT + column * (self.width + BETWEEN), top, middle


def timeline_figure(timeline: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG: norms (a) by block at the latest diagnosis, (b) by training step, (c) of all runs side by side.

    Args:
        timeline: format `vitreg-timeline/1`.
        path: the file to write; its folder is made.
    """
    runs = timeline["runs"]
    by_block = [run["diagnoses"][-1]["blocks"] for run in runs]
    by_step = [[diagnosis["blocks"][run["block"]] for diagnosis in run["diagnoses"]] for run in runs]
    everywhere, over_time = [block for run in by_block for block in run], [block for run in by_step for block in run]
    scale = share_scale(everywhere + over_time)
    one_block = len({run["block"] for run in runs}) == 1
    layout = _Layout(len(runs), repeated=len(runs) > MOST_COLUMNS or not one_block)
    sheet = layout.sheet
    names = [shorten(run["name"]) for run in runs]
    with_artifacts = sum(bool(run["has_artifacts"]) for run in runs)
    title = names[0] if len(runs) == 1 else f"Artifacts in {with_artifacts or 'none'} of {len(runs)} runs"
    sheet.text(title, MARGIN, 0.14, **TITLE)
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        line = run["verdict"] if len(runs) == 1 else f"{name}: {run['verdict']}"
        sheet.text(line, MARGIN, 0.42 + LINE * i, fontsize=9.5, color=QUIET)
    sheet.text("(a)  by block, at the latest diagnosis", MARGIN, layout.top, **PANEL)
    after = f", after block {runs[0]['block']}" if one_block else ""
    sheet.text(f"(b)  by training step{after}", MARGIN, layout.middle, **PANEL)
    most = max(block["outlier_fraction"] for block in over_time)
    for i, run in enumerate(runs):
        x, y, lower = layout.cells(i)
        first = i % layout.columns == 0
        sheet.text(shorten(run["name"], 30), x, y, **NAME)
        facts = f"{run['recipe']}, {_size(run)}, {counted(run['model']['num_registers'], 'register')}"
        sheet.text(facts, x, y + 0.17, fontsize=8, color=QUIET)
        axes = sheet.plot(x, y + NAMES, layout.width, HEIGHT)
        norm_axis(axes, norm_limits(everywhere), labeled=first)
        _draw_blocks(axes, run, by_block[i], scale)
        if layout.names:
            block = "" if one_block else f", block {run['block']}"
            sheet.text(f"{shorten(run['name'], 30 - len(block))}{block}", x, lower, **NAME)
        axes = sheet.plot(x, lower + layout.names, layout.width, HEIGHT)
        strip = sheet.plot(x, lower + layout.names + HEIGHT + APART, layout.width, STRIP)
        norm_axis(axes, norm_limits(over_time), labeled=first)
        share_axis(strip, most, labeled=first)
        _draw_steps(axes, strip, run, by_step[i], _latest_step(runs, run), scale)
    legend = {
        "registers": any(run["model"]["num_registers"] for run in runs),
        "outliers": any(block["outlier_fraction"] for block in everywhere + over_time),
    }
    _draw_legend(sheet, layout.right, layout.top + HEADING + NAMES, scale, **legend)
    if len(runs) > 1:
        what, order, labels = _sorted_by_model(runs)
        sheet.text(f"(c)  {what}", layout.right - 0.4, layout.middle, **PANEL)
        axes = sheet.plot(layout.right, layout.middle + HEADING + layout.names, layout.side, HEIGHT)
        norm_axis(axes, norm_limits(over_time), labeled=True)
        _draw_models(axes, [by_step[i][-1] for i in order], labels, layout.side, scale)
    return sheet.write(path)


def _size(run: Run) -> str:
    return f"{run['model']['parameters'] / 1e6:,.1f} M"


def _draw_blocks(axes: Axes, run: Run, blocks: Sequence[Block], scale: ColorScale) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, block in enumerate(blocks):
        draw_column(axes, place - 0.45, place + 0.45, block, scale)
    draw_registers(axes, range(len(blocks)), blocks)
    axes.set_xlim(-0.7, len(blocks) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("block", labelpad=2, fontsize=8.5, color=QUIET)
    if run["onset_block"] is not None:
        mark(axes, run["onset_block"] - 0.5, f"from block {run['onset_block']}")


def _draw_steps(axes: Axes, strip: Axes, run: Run, blocks: Sequence[Block], end: int, scale: ColorScale) -> None:
    """Norms by training step, and below them the share of the patches that are outliers."""
    from matplotlib.ticker import MaxNLocator

    steps = [diagnosis["step"] for diagnosis in run["diagnoses"]]
    spans = _spans(steps, end)
    for (left, right), block in zip(spans, blocks, strict=True):
        draw_column(axes, left, right, block, scale)
    draw_registers(axes, steps, blocks)
    shares = [block["outlier_fraction"] for block in blocks]
    strip.plot(steps, shares, color=OUTLIER, linewidth=1.3, marker=".", clip_on=False)
    for each in (axes, strip):
        each.set_xlim(-0.03 * end, 1.03 * end)
        each.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelbottom=False)
    strip.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step >= 10000 else f"{step:g}")
    strip.set_xlabel("training step", labelpad=2, fontsize=8.5, color=QUIET)
    if run["first_step"] is not None:
        begin = max(spans[steps.index(run["first_step"])][0], -0.03 * end)
        mark(axes, begin, f"from step {run['first_step']}")
        mark(strip, begin)


def _latest_step(runs: Sequence[Run], run: Run) -> int:
    """Of the runs that are as long as this one, so that their axes agree, and have no empty part to come."""
    alike = [other for other in runs if other["num_steps"] == run["num_steps"]]
    return max(1, *(other["diagnoses"][-1]["step"] for other in alike))


def _spans(steps: Sequence[int], end: int) -> list[tuple[float, float]]:
    """Columns around the steps: as wide as steps usually are apart, and never into the next."""
    apart = np.diff(steps)
    usual = max(float(np.median(apart)), 0.01 * end) if len(apart) else 0.1 * end
    gaps = np.array([usual, *apart, usual], dtype=float).clip(max=usual) / 2
    return [(step - gap, step + next_gap) for step, gap, next_gap in zip(steps, gaps[:-1], gaps[1:], strict=True)]


def _sorted_by_model(runs: Sequence[Run]) -> tuple[str, list[int], list[str]]:
    """By what the runs differ, their order, and what to call them."""
    registers = [run["model"]["num_registers"] for run in runs]
    # A register adds as many parameters as a token has channels, which is no difference in size.
    sizes = [run["model"]["parameters"] - r * run["model"]["embed_dim"] for run, r in zip(runs, registers, strict=True)]
    order = sorted(range(len(runs)), key=lambda i: (sizes[i], registers[i]))
    differ = [word for word, values in (("model size", sizes), ("registers", registers)) if len(set(values)) > 1]
    if not differ:
        return "by run", order, [shorten(runs[i]["name"], 19) for i in order]
    write = {"model size": _size, "registers": lambda run: f"{run['model']['num_registers']} reg."}
    return f"by {' and '.join(differ)}", order, ["\n".join(write[word](runs[i]) for word in differ) for i in order]


def _draw_models(axes: Axes, blocks: Sequence[Block], labels: Sequence[str], width: float, scale: ColorScale) -> None:
    for place, block in enumerate(blocks):
        draw_column(axes, place - 0.4, place + 0.4, block, scale)
        norms = block["register_norms"] or ()
        axes.plot([place] * len(norms), norms, "o", color=REGISTER, markersize=3.5)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    fits = 0.075 * longest * len(labels) < width
    axes.set_xticks(range(len(blocks)), labels, rotation=0 if fits else 90)


def _draw_legend(sheet: Sheet, x: float, y: float, scale: ColorScale, registers: bool, outliers: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sheet.color_bar(x, y, HEIGHT, scale)
    patches = Patch(color=colors()(0.75))
    entries: dict[str, Any] = {"patches": patches, "their median": (patches, Line2D([], [], color=MEDIAN))}
    if outliers:
        entries["outliers"] = Patch(color=colors(outliers=True)(0.5))
        entries["threshold"] = Line2D([], [], color=OUTLIER, linewidth=1.1)
        entries["where they begin"] = Line2D([], [], color=OUTLIER, linewidth=1, linestyle=DASHES)
    if registers:
        entries["registers"] = Line2D([], [], color=REGISTER, linewidth=0.9, marker="o", markersize=3)
    place = (x + 0.78) / sheet.width, 1 - (y - 0.06) / sheet.height
    style = {"loc": "upper left", "bbox_to_anchor": place, "fontsize": 8, "frameon": False}
    sheet.figure.legend(entries.values(), entries.keys(), **style)
