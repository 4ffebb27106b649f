"""Names that version 0.1 had for what is called otherwise now: its files load, and its keyword arguments are taken."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config", bound=type)

_FIELDS = {"pre_norm": "norm_pre", "pool_norm": "fc_norm", "crop_fraction": "crop_pct", "colour_jitter": "color_jitter"}
_TENSORS = {"pre_norm": "norm_pre", "pool_norm": "fc_norm", "scale1": "ls1", "scale2": "ls2", "positions": "pos_embed"}


def current_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config under their names of today."""
    return {_FIELDS.get(name, name): value for name, value in values.items()}


def accepts_old_names(config: Config) -> Config:
    """A dataclass that takes its fields under their old names too, for one version and with a `DeprecationWarning`."""
    init = config.__init__
    fields = {field.name for field in dataclasses.fields(config)}

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for old in kwargs.keys() & _FIELDS.keys():
            if (new := _FIELDS[old]) in fields:
                warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
        init(self, *args, **kwargs)

    config.__init__ = __init__
    return config


def has_old_names(names: list[str]) -> bool:
    """Whether tensors are called as in 0.1."""
    return with_new_names(names) != names


def with_old_names(value: Any) -> Any:
    """A state dict, the nested state of a checkpoint or a list of names as 0.1 wrote it: with tensors' old names."""
    return _renested(value, {new: old for old, new in _TENSORS.items()})


def with_new_names(value: Any) -> Any:
    """The inverse of `with_old_names`."""
    return _renested(value, _TENSORS)


def _renested(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {_replaced(k, names) if isinstance(k, str) else k: _renested(v, names) for k, v in value.items()}
    if isinstance(value, list):  # the names of an optimizer's groups
        return [_replaced(one, names) if isinstance(one, str) else one for one in value]
    return value


def _replaced(name: str, names: Mapping[str, str]) -> str:
    """A dotted name, part by part."""
    return re.sub(r"[^.]+", lambda part: names.get(part[0], part[0]), name)
