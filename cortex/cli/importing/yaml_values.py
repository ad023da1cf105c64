"""Values of a parsed YAML file, whose types the file's author chose. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def as_table(value: object) -> Mapping[str, Any]:
    """Empty if the value is not a table."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[Any]:
    """Empty if the value is not a list."""
    return value if isinstance(value, list) else []


def as_number(value: object) -> float | None:
    """None if the value is not a finite number. PyYAML reads `1e-06`, which has no point, as a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
