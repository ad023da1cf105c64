"""An alias of models.toml: a model's other name, and what it changes in requests. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import msgspec
from pydantic import Field, field_validator, model_validator

from shared.settings import SettingsModel

_RESERVED: Final = {
    "model": "the alias itself says which model it is",
    "stream": "only the client knows whether it reads a stream",
}

Tree = Mapping[str, Any]
"""Values of members by their names; a mapping stands for members of members."""


class MemberEdit(msgspec.Struct, frozen=True):
    """What becomes of one member of a JSON object, or of one field of a form.

    set: it has the JSON `value`. default: likewise, unless the client gave it. drop: it is removed. merge: it is an
    object, whose `members` are edited; if it is missing, it becomes `value`, unless that is b"". `overrides`: also if
    it is not an object.
    """

    action: Literal["set", "default", "drop", "merge"]
    value: bytes = b""
    members: dict[str, MemberEdit] = {}
    overrides: bool = False


class Rewrite(NamedTuple):
    """What stands in for a name that engines do not know: the model's id in the request, the id or `id@variant` for the
    choice of an engine, and further changes of the body, that of `model` among them; None for no others."""

    model_id: str
    name: str
    edits: dict[str, MemberEdit] | None = None


class Alias(SettingsModel):
    """Another name for `model`, an id or `id@variant`.

    `set` is put into each request; of a table only the keys that it names. `default` likewise, where the client gave
    nothing. `drop` removes keys; `a.b` is the key `b` of the table `a`. Values are those of JSON.
    """

    model: str
    """The id or `id@variant` that it stands for."""
    set: dict[str, Any] = Field(default_factory=dict)
    """What each request for the alias gets, whatever the client sent. Of a table only the keys named here are replaced:
    above, other keys of `chat_template_kwargs` stay. Default: nothing."""
    default: dict[str, Any] = Field(default_factory=dict)
    """What a request gets if the client did not send that key; in tables too, key by key. `null` counts as sent.
    Default: nothing."""
    drop: tuple[str, ...] = ()
    """Keys that are removed; `"a.b"` is the key `b` of the table `a`. Default: nothing."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, data: object) -> object:
        return {"model": data} if isinstance(data, str) else data

    @field_validator("set", "default")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_reserved(value)
        _check_json(value, "")
        return value

    @field_validator("drop")
    @classmethod
    def _names_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not all(path.split(".")):
                raise ValueError(f"{path!r} must be a key, or keys of nested tables joined by dots")
        _check_reserved(value)
        return value

    @model_validator(mode="after")
    def _without_contradiction(self) -> Alias:
        self.edits("")
        return self

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """`set`, `default` and `drop`, as far as there are any, as JSON."""
        return {key: value for key, value in self.model_dump(mode="json", exclude={"model"}).items() if value}

    def edits(self, model_id: str) -> dict[str, MemberEdit] | None:
        """The changes of a request's body, with this model in place of the alias; None if only that changes.

        Raises:
            ValueError: two of `set`, `default` and `drop` have the same key.
        """
        if not self.parameters:
            return None
        named = {"model": MemberEdit("set", json.dumps(model_id).encode())}
        return {**named, **_edits(self.set, self.default, _tree_of(self.drop), "")}


def _check_reserved(names: Mapping[str, Any] | tuple[str, ...]) -> None:
    for name in names:
        if name in _RESERVED:
            raise ValueError(f"{name!r} cannot be changed: {_RESERVED[name]}")


def _check_json(value: object, path: str) -> None:
    """Raises ValueError for what TOML has and JSON does not."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_json(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            _check_json(inner, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {value} is not a number of JSON")
    elif not isinstance(value, (str, int, float, bool)):
        raise ValueError(f"{path}: JSON has no {type(value).__name__}: write it as a string")


def _tree_of(paths: tuple[str, ...]) -> dict[str, Any]:
    """The keys to drop, nested as they are in a body. An empty mapping is a key to drop as a whole."""
    tree: dict[str, Any] = {}
    for path in paths:
        inner, names = tree, path.split(".")
        for depth, name in enumerate(names, 1):
            if inner.get(name) == {} or (depth == len(names) and name in inner):
                raise ValueError(f"drop: {path!r} is in it twice, or with a key of the same table")
            inner = inner.setdefault(name, {})
    return tree


def _edits(values: Tree, defaults: Tree, dropped: Tree, path: str) -> dict[str, MemberEdit]:
    found: dict[str, MemberEdit] = {}
    for name in dict.fromkeys((*values, *defaults, *dropped)):
        at = f"{path}.{name}" if path else name
        given = {
            kind: tree[name]
            for kind, tree in (("set", values), ("default", defaults), ("drop", dropped))
            if name in tree
        }
        if all(isinstance(each, dict) and (each or kind != "drop") for kind, each in given.items()):
            inner = [given.get(kind, {}) for kind in ("set", "default", "drop")]
            members = _edits(inner[0], inner[1], inner[2], at)
            value = b"" if given.keys() == {"drop"} else _encoded(_union(inner[0], inner[1]))
            found[name] = MemberEdit("merge", value, members, "set" in given)
        elif len(given) > 1:
            raise ValueError(f"{at!r} is in both {' and '.join(given)}")
        elif "drop" in given:
            found[name] = MemberEdit("drop")
        else:
            found[name] = MemberEdit("set" if "set" in given else "default", _encoded(next(iter(given.values()))))
    return found


def _union(values: Tree, defaults: Tree) -> dict[str, Any]:
    """Both together; they share no key but those of tables."""
    both = {name: _union(values[name], defaults[name]) for name in values if name in defaults}
    return {**defaults, **values, **both}


def _encoded(value: object) -> bytes:
    return json.dumps(value).encode()
