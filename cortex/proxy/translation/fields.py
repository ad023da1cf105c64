"""Reads the fields of a request's JSON, with errors that name the field. Pure."""

from __future__ import annotations

from typing import Any, Final

from cortex.proxy.translation.interface import Json
from shared.errors import InvalidRequest

_EFFORTS: Final = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that many engines refuse."""


def invalid(param: str, reason: str) -> InvalidRequest:
    """The error for the field at `param`, such as `input[2].content`."""
    return InvalidRequest(f"{param}: {reason}", param=param)


def is_set(body: Json, key: str) -> bool:
    """True unless the field is missing, null or empty."""
    return body.get(key) not in (None, "", [], {}, False)


def text_of(holder: Json, key: str, param: str) -> str:
    """A string field of the object at `param`. Raises InvalidRequest for anything else."""
    value = holder.get(key)
    if not isinstance(value, str):
        raise invalid(f"{param}.{key}", "must be a string")
    return value


def wants_stream(body: Json) -> bool:
    """The field `stream`. Raises InvalidRequest unless it is a boolean, null or missing."""
    value = body.get("stream")
    if value is not None and not isinstance(value, bool):
        raise invalid("stream", "must be true or false")
    return value is True


def effort_of(holder: Json, param: str) -> Json:
    """`effort` of the object at `param` as `reasoning_effort` of a chat, {} without one."""
    if holder.get("effort") is None:
        return {}
    effort = text_of(holder, "effort", param)
    return {"reasoning_effort": _EFFORTS.get(effort, effort)}


def objects_of(value: Any, param: str) -> list[Json]:
    """A list of objects, [] for null. Raises InvalidRequest for anything else."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise invalid(param, "must be a list")
    for index, element in enumerate(value):
        if not isinstance(element, dict):
            raise invalid(f"{param}[{index}]", "must be an object")
    return value


def object_of(value: Any, param: str) -> Json:
    """An object, {} for null. Raises InvalidRequest for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(param, "must be an object")
    return value
