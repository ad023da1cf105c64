"""A valid instance of a JSON schema, for tool arguments and structured output. Pure and deterministic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_MAX_DEPTH = 12  # of nested schemas; optional parts of a recursive schema are left out below it
_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "email": "ada@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "url": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_PADDING = " and more"


def instance(schema: object, text: str, *, optional: bool = False) -> Any:
    """A value that satisfies `schema`. `text` is what strings say; `optional` also fills properties that are not
    required.

    Supports what structured output allows: types, enum, const, properties, items, combinations, $ref, lengths, bounds
    and common formats. `pattern` and `not` are ignored.
    """
    return _Generator(schema if isinstance(schema, Mapping) else {}, text, optional=optional).value(schema)


class _Generator:
    def __init__(self, root: Schema, text: str, *, optional: bool) -> None:
        self._root = root
        self._text = text
        self._optional = optional

    def value(self, given: object, depth: int = 0) -> Any:
        schema = self._resolved(given)
        for key in ("const", "default"):
            if key in schema:
                return schema[key]
        for key in ("enum", "examples"):
            choices = schema.get(key)
            if isinstance(choices, list) and choices:
                return choices[0]
        return self._of_kind(_kind(schema), schema, depth)

    def _of_kind(self, kind: str, schema: Schema, depth: int) -> Any:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return _number(schema, whole=kind == "integer")
        return True if kind == "boolean" else None

    def _resolved(self, given: object, hops: int = 0) -> dict[str, Any]:
        """The schema without $ref and combinations: the first branch of anyOf and oneOf that is not null, and all
        branches of allOf, merged."""
        schema = dict(given) if isinstance(given, Mapping) else {}
        if hops > _MAX_DEPTH:
            return schema
        reference = schema.pop("$ref", None)
        if isinstance(reference, str):
            schema = {**self._resolved(self._target(reference), hops + 1), **schema}
        for key in ("anyOf", "oneOf"):
            branches = schema.pop(key, None)
            if isinstance(branches, list) and branches:
                resolved = [self._resolved(branch, hops + 1) for branch in branches]
                schema |= next((branch for branch in resolved if branch.get("type") != "null"), resolved[0])
        for branch in schema.pop("allOf", None) or ():
            schema = _merged(schema, self._resolved(branch, hops + 1))
        return schema

    def _target(self, reference: str) -> object:
        """What a local reference such as `#/$defs/Name` points to."""
        found: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        properties = schema.get("properties")
        named = dict(properties) if isinstance(properties, Mapping) else {}
        required = [name for name in schema.get("required") or () if isinstance(name, str)]
        wanted = list(named) if self._optional and depth < _MAX_DEPTH else required
        filled = {name: self.value(named.get(name), depth + 1) for name in dict.fromkeys([*wanted, *required])}
        extra = schema.get("additionalProperties")
        while len(filled) < _size(schema, "minProperties"):
            filled[f"key{len(filled) + 1}"] = self.value(extra, depth + 1)
        return filled

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        tuple_items = schema.get("prefixItems")
        items = list(tuple_items) if isinstance(tuple_items, list) else []
        most = schema.get("maxItems")
        least = _size(schema, "minItems")
        common = 1 if depth < _MAX_DEPTH and "items" in schema and not items else 0
        wanted = max(least, min(common, most) if isinstance(most, int) else common, len(items))
        values = [self.value(items[index] if index < len(items) else schema.get("items"), depth + 1)
                  for index in range(wanted)]  # fmt: skip
        if schema.get("uniqueItems") is True:
            values = [value if index == 0 else _other(value, index) for index, value in enumerate(values)]
        return values

    def _string(self, schema: Schema) -> str:
        text = _FORMATS.get(str(schema.get("format")), self._text)
        least, most = _size(schema, "minLength"), schema.get("maxLength")
        while len(text) < least:
            text += _PADDING
        return text[:most] if isinstance(most, int) else text


def _kind(schema: Schema) -> str:
    """The type to generate; for a list of types the first that is not null."""
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((each for each in kind if each != "null"), "null")
    if isinstance(kind, str):
        return kind
    if "properties" in schema or "required" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else "string"


def _merged(one: dict[str, Any], other: Schema) -> dict[str, Any]:
    merged = {**one, **other}
    for key in ("properties", "$defs"):
        if key in one and key in other:
            merged[key] = {**one[key], **other[key]}
    if "required" in one and "required" in other:
        merged["required"] = [*one["required"], *other["required"]]
    return merged


def _number(schema: Schema, *, whole: bool) -> int | float:
    step = schema.get("multipleOf")
    unit = step if isinstance(step, int | float) and step > 0 else 1
    lowest, highest = _bound(schema, "minimum", "exclusiveMinimum"), _bound(schema, "maximum", "exclusiveMaximum")
    value: int | float = unit
    if lowest is not None:
        limit, exclusive = lowest
        if value < limit or (exclusive and value == limit):
            value = math.ceil(limit / unit) * unit
            value += unit if exclusive and value == limit else 0
    if highest is not None:
        limit, exclusive = highest
        if value > limit or (exclusive and value == limit):
            value = math.floor(limit / unit) * unit
            value -= unit if exclusive and value == limit else 0
            if lowest is not None and value < lowest[0]:
                value = (lowest[0] + limit) / 2
    return int(value) if whole else value


def _bound(schema: Schema, inclusive: str, exclusive: str) -> tuple[float, bool] | None:
    for key, excluded in ((exclusive, True), (inclusive, False)):
        value = schema.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value, excluded
    return None


def _size(schema: Schema, key: str) -> int:
    value = schema.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _other(value: Any, number: int) -> Any:
    """A value like `value` that differs from those with a lower number."""
    if isinstance(value, str):
        return f"{value} {number + 1}"
    return value + number if isinstance(value, int | float) and not isinstance(value, bool) else value
