"""`vitreg models`: what can be loaded by name."""

from __future__ import annotations

import dataclasses
import sys

from vitreg.cli.output import print_json, progress


def models(filter: str = "", coverage: bool = False, json: bool = False) -> int:
    """List checkpoints by name: parameters, patch size, registers, license.

    Besides these, every name of a model that --coverage says is converted can be given to --model.

    Example: vitreg models --filter dinov2

    Args:
        filter: part of a name, or a pattern with *.
        coverage: instead, what becomes of every Vision Transformer of the timm, transformers and open_clip that are
            installed, as Markdown; takes minutes.
        json: print the list as JSON.
    """
    if coverage:
        return _coverage(filter, json)
    from rich.console import Console
    from rich.table import Table

    from vitreg.checkpoints import list_models

    found = list_models(filter)
    if json:
        print_json([dataclasses.asdict(model) for model in found])
        return 0
    if not found:
        raise ValueError(f"no model's name contains {filter!r}; `vitreg models` lists all")
    table = Table("name", "parameters", "patch", "registers", "licence", "weights from timm", box=None, pad_edge=False)
    for row in found:
        size = f"{row.million_parameters:,.1f} M"
        table.add_row(
            row.name, size, str(row.patch_size), str(row.num_registers), row.licence, row.timm or "comes with vitreg"
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _coverage(filter: str, json: bool) -> int:
    from vitreg.checkpoints.coverage import coverage, markdown, versions

    found = []
    with progress("building models without weights") as advance:
        for model in coverage(filter):
            found.append(model)
            advance(len(found), None)
    if not found:
        raise ValueError(f"no model with a Vision Transformer has {filter!r} in its name; leave out --filter for all")
    if json:
        print_json({"versions": versions(), "models": [dataclasses.asdict(model) for model in found]})
    else:
        print(markdown(found))
    return 0
