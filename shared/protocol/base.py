"""The base of every wire model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

PROTOCOL_V1: Final = "protocol v1"
"""Marks a list that protocol v1 requires: `answers.read_answer` leaves out neither the list nor one of its entries."""


READ_ONLY: Any = Field(default=None, exclude=True)
"""A field that foreign neurons send and ours does not: never part of a dump."""


class WireModel(BaseModel):
    """Immutable; ignores unknown fields, which a newer or third-party peer may send. Numbers are finite: nothing that
    computes with them can fail for NaN or an infinity."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Treats null as absent where a field has a default: third-party peers send null for values they lack."""
        if type(data) is dict and None not in data.values():
            return data  # the usual case, and polls are frequent
        if not isinstance(data, Mapping):
            return data
        fields = cls.model_fields
        return {k: v for k, v in data.items() if v is not None or k not in fields or fields[k].is_required()}


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The first invalid field, with dots between its levels ("" for the whole value), and what is wrong with it."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, problem["loc"])), plain_reason(problem)


_PLAIN: Final = {
    "extra_forbidden": "unknown field",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "enum": "must be {expected}",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "missing": "required, but missing",
    "model_attributes_type": "must be a table",
    "model_type": "must be a table",
    "path_type": "must be a string",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "tuple_type": "must be a list",
}


def plain_reason(problem: Mapping[str, Any]) -> str:
    """What is wrong with a value, for people. `problem` is an entry of `ValidationError.errors()`."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "string_too_short":
        least = context["min_length"]
        return "must not be empty" if least == 1 else f"must have at least {least} characters"
    if kind in _PLAIN:
        return _PLAIN[kind].format(**context)
    return str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return round(value) if isinstance(value, float) and math.isfinite(value) else value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _listed(value: Any) -> Any:
    return [] if value is None else value


WHOLE: Final = BeforeValidator(_whole)
"""Reads a number in a string, and rounds a float, for a field that holds a whole number."""

Text = Annotated[str, BeforeValidator(_text)]
"""Text of protocol v1; a number is read as its digits (a model id `7`, a compute capability `8.9`)."""

Mib = Annotated[int, WHOLE]
"""Mebibytes. The protocol's `*_mb` fields count 2**20 bytes, as nvidia-smi does; fractions are rounded."""

Tokens = Annotated[int, WHOLE, Field(ge=1)]
"""A limit in tokens."""

NameList = Annotated[list[str], BeforeValidator(_listed)]
"""Names; null is an empty list."""

IndexList = Annotated[list[int], BeforeValidator(_listed)]
"""Device indices; null is an empty list (protocol v1 neurons send null for a model without devices)."""
