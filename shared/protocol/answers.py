"""Reads a neuron's answers: only what protocol v1 requires can make one invalid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from shared.protocol.base import PROTOCOL_V1, WireModel

Wanted = TypeVar("Wanted")

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}  # by type; they are costly to make


def read_answer(wanted: type[Wanted], data: Any) -> tuple[Wanted, dict[str, str]]:
    """A neuron's answer, and what was left out of it: field (dots between its levels) -> what is wrong with it.

    A value that does not validate counts as absent: its field if that has a default, else the smallest list entry or
    field with a default around it. Not for requests or configuration: their senders need the error.

    Raises:
        ValidationError: nothing could be left out, because protocol v1 requires the invalid part.
    """
    adapter: TypeAdapter[Wanted] | None = _ADAPTERS.get(wanted)
    if adapter is None:
        adapter = _ADAPTERS[wanted] = TypeAdapter(wanted)
    try:
        return adapter.validate_python(data), {}  # the usual case, and polls are frequent
    except ValidationError as error:
        left_out: dict[str, str] = {}
        omitted: dict[Any, Any] = {}
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            field, path = _optional_part(wanted, problem["loc"])
            if not path:
                raise
            left_out.setdefault(field, problem["msg"])
            _add(omitted, path)
    return adapter.validate_python(_without(data, omitted)), left_out


def _optional_part(wanted: Any, where: Sequence[int | str]) -> tuple[str, Sequence[int | str]]:
    """The name of the field at `where`, and the path of the smallest part that may be absent (empty: none)."""
    model, required, size = _model_in(wanted), True, 0
    names: list[str] = []
    for depth, step in enumerate(where, 1):
        if isinstance(step, str):
            field = None if model is None else model.model_fields.get(step)
            if field is None:  # a key of a table
                break
            names.append(step)
            required = PROTOCOL_V1 in field.metadata
            model = _model_in(field.annotation)
            if required or field.is_required():
                continue
        elif required:
            continue
        size = depth
    return ".".join(names), where[:size]


def _model_in(annotation: Any) -> type[WireModel] | None:
    """The wire model in an annotation such as `list[Device]` or `Progress | None`."""
    parts = get_args(annotation)
    if parts:
        return next((found for part in parts if (found := _model_in(part)) is not None), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, WireModel) else None


def _add(omitted: dict[Any, Any], path: Sequence[int | str]) -> None:
    """Adds a path to a tree whose leaves are None. A shorter path includes the longer ones."""
    *parents, last = path
    for step in parents:
        inner = omitted.setdefault(step, {})
        if inner is None:
            return
        omitted = inner
    omitted[last] = None


def _without(value: Any, omitted: Mapping[Any, Any]) -> Any:
    """The value without the omitted parts. Shares the rest with it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    kept = [
        (key, entry if key not in omitted else _without(entry, omitted[key]))
        for key, entry in entries
        if key not in omitted or omitted[key] is not None
    ]
    return dict(kept) if isinstance(value, dict) else [entry for _, entry in kept]
