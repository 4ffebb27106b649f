"""Results as JSON has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def to_json(value: Any) -> Any:
    """A value in JSON types: by its `to_dict`, or its fields where it has them; arrays to six digits."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "tolist"):
        return value.round(6).tolist()
    if dataclasses.is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return value
