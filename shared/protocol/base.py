"""The base of every wire model."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class WireModel(BaseModel):
    """Immutable; ignores fields it does not know, so that a newer or foreign peer is understood."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


def _whole(value: Any) -> Any:
    return round(value) if isinstance(value, float) and math.isfinite(value) else value


def _listed(value: Any) -> Any:
    return [] if value is None else value


Mib = Annotated[int, BeforeValidator(_whole)]
"""Mebibytes. The protocol's `*_mb` fields count 2**20 bytes, as nvidia-smi does; fractions are rounded."""

IndexList = Annotated[list[int], BeforeValidator(_listed)]
"""Device indices; null is an empty list (seed neurons send null for a model that holds no device)."""
