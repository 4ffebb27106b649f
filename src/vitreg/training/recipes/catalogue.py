"""The recipes by name, and the configs of runs that are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

from vitreg.common.renamed import current_fields
from vitreg.model import ViTConfig
from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.recipes import clip, deit3, dinov2, distill
from vitreg.training.recipes.configs import METHODS

RECIPES: dict[str, Callable[..., TrainingConfig]] = {
    "deit3": deit3.deit3,
    "dinov2": dinov2.dinov2,
    "clip": clip.clip,
    "distill": distill.distill,
}


def config_from_dict(values: dict[str, Any]) -> TrainingConfig:
    """The config that `TrainingConfig.to_dict` wrote; keys that are not of it are left aside.

    Raises:
        ValueError: an unknown recipe.
    """
    if "precision" in values:  # as the first runs called it
        values = {**values, "dtype": values["precision"]}
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    fields = {key: value for key, value in values.items() if key in known}
    if fields.get("recipe") not in METHODS:
        raise ValueError(f"recipe {fields.get('recipe')!r} is unknown; choose one of {', '.join(METHODS)}")
    fields["model"] = ViTConfig.from_dict(fields["model"])
    fields["optimizer"] = _from_json(OptimizerConfig, fields["optimizer"])
    fields["method"] = _from_json(METHODS[fields["recipe"]], current_fields(fields["method"]))
    return TrainingConfig(**fields)


def _from_json(kind: type[Any], values: dict[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict`, for tuples and dataclasses in a dataclass."""
    kinds = get_type_hints(kind)
    nested = {name: _from_json(kinds[name], value) for name, value in values.items() if isinstance(value, dict)}
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**{**values, **nested, **tuples})
