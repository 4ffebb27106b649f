"""A config as flags: each of its fields is one, and those that are given replace what a recipe decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

from tyro.conf import arg

from vitreg.cli.help import explanations

AnyConfig = TypeVar("AnyConfig")

FLAGS = {"num_steps": "steps", "name": "optimizer"}
"""Flags that are not called as the fields that they set."""


def overrides(config: Any, part: Any = None, **nested: Any) -> Any:
    """A `TypedDict` of what is given of a dataclass' fields, whose names, types and explanations are the dataclass'.

    Args:
        config: the dataclass; dataclasses in it are flags, too.
        part: a base of it, where not all of its fields can be given.
        nested: which dataclasses are to be in further fields.
    """
    kinds, explained = get_type_hints(part or config) | nested, explanations(config)
    fields = {
        name: Annotated[
            overrides(kind) if dataclasses.is_dataclass(kind) else kind,
            arg(name=FLAGS.get(name), help=explained[name]),
        ]
        for name, kind in kinds.items()
    }
    return TypedDict(config.__name__, fields, total=False)  # pyright: ignore


def changed(config: AnyConfig, given: dict[str, Any]) -> AnyConfig:
    """The config with what was given, at any depth, in place of its own."""
    new = {
        name: changed(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in given.items()
    }
    return dataclasses.replace(config, **new)  # pyright: ignore


def flags_of(given: dict[str, Any]) -> Iterator[str]:
    """The flags that were given."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from flags_of(value)
        else:
            yield f"--{FLAGS.get(name, name).replace('_', '-')}"
