"""Writes docs/reference from the configuration classes: `python -m tests.contract.reference`, part of `make fmt`.

Types, limits and defaults are those of pydantic. A key's description is the docstring below its field; what follows
"Default: " there replaces the value in the column of defaults. Its links are relative to docs/.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cortex.config.catalogue import Catalogue
from cortex.config.diff import RELOAD_OF, Reload
from cortex.config.settings import CortexConfig
from neuron.config import NeuronConfig
from tests.contract.documents import TOP
from tests.contract.prose import wrapped

FILES: dict[str, type[BaseModel]] = {
    "cortex.toml": CortexConfig,
    "neuron.toml": NeuronConfig,
    "models.toml": Catalogue,
}
_INTRODUCTIONS = {
    "cortex.toml": "cortex applies changes while it runs, except for keys marked *restart*. Each key can come from the "
    "environment too.",
    "neuron.toml": "neuron reads the file once, at its start. Each key can come from the environment too.",
    "models.toml": "cortex applies changes while it runs: to the next load of a model, and for aliases, limits and "
    "prices to the next request.",
}
_UNITS = {
    "secs": "seconds",
    "hours": "hours",
    "days": "days",
    "mb": "MiB",
    "mib": "MiB",
    "gbps": "Gbit/s",
    "chars": "characters",
    "per_kwh": "currency per kWh",
    "tpm": "tokens per minute",
    "rpm": "requests per minute",
}


@dataclass(frozen=True)
class Table:
    """A table of a file: its `heading` in TOML ("" at the top level), the class, and its plain keys."""

    heading: str
    model: type[BaseModel]
    keys: Mapping[str, FieldInfo]

    def path(self, key: str) -> str:
        """`gateway.listen`"""
        return f"{self.heading.strip('[]')}.{key}".removeprefix(".")


def inner_model(annotation: object) -> tuple[type[BaseModel], str] | None:
    """The configuration class that a field holds, and how: "one", "list" or "dict"; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, "one"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    for argument in arguments:
        found = inner_model(argument)
        if found is not None:
            if origin in (list, tuple):
                return found[0], "list"
            if origin in (dict, Mapping):
                return found[0], "dict"
            return found
    return None


def tables_of(model: type[BaseModel], path: str = "", form: str = "one") -> Iterator[Table]:
    """The tables of the class and of all nested classes, named as in TOML."""
    plain: dict[str, FieldInfo] = {}
    nested: list[tuple[type[BaseModel], str, str]] = []
    for name, field in model.model_fields.items():
        found = inner_model(field.annotation)
        if found is None or name == "devices":  # a list of preset names or tables
            plain[name] = field
        if found is not None:
            below = f"{path}.{name}" if path else name
            nested.append((found[0], f"{below}.NAME" if found[1] == "dict" else below, found[1]))
    if path or plain:
        own = sorted(plain, key=lambda name: name not in model.__annotations__)  # before those of its bases
        heading = f"[[{path}]]" if form == "list" else f"[{path}]"
        yield Table(heading if path else "", model, {name: plain[name] for name in own})
    for inner, below, kind in nested:
        yield from tables_of(inner, below, kind)


@cache
def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings below the fields of the class and its bases, each on one line."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__[:-1]):
        if base is BaseModel or not issubclass(base, BaseModel):
            continue
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def described(table: Table, key: str) -> tuple[str, str]:
    """The key's description, and its default in words ("" if the value itself says it)."""
    text, _, default = _docstrings(table.model).get(key, "").partition(" Default: ")
    return text, default.removesuffix(".")


def _literal(value: Any) -> str:
    """The value as TOML writes it, "" for None."""
    if value is None:
        return ""
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, default=str)}`"


def default_of(table: Table, key: str) -> str:
    """The cell of the default."""
    field = table.keys[key]
    if field.is_required():
        return "required"
    return described(table, key)[1] or _literal(field.get_default(call_default_factory=True, validated_data={}))


def _limits(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        return f", {least:g} to {most:,g}" if most < 1e6 else f", at least {least:g}"
    above = schema.get("exclusiveMinimum")
    text = f", at least {least:g}" if least is not None else f", above {above:g}" if above is not None else ""
    return text + (f", at most {most:,g}" if most is not None and most < 1e6 else "")


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(each) for each in schema["anyOf"] if each.get("type") != "null"))
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if values:
        return ", ".join(f"`{json.dumps(each)}`" for each in values)
    kind = schema.get("type", "table" if "$ref" in schema else "any")
    if kind == "array":
        items = schema.get("prefixItems")
        return f"list of {len(items)} numbers" if items else f"list of {_plural(_type(schema['items']))}"
    if kind == "string" and schema.get("format") == "path":
        return "path"
    return ("table" if kind == "object" else kind) + _limits(schema)


def _plural(name: str) -> str:
    return " or ".join(f"{word.partition(',')[0]}s" for word in name.split(" or "))


def type_of(table: Table, key: str) -> str:
    """The cell of the type, with limits and unit."""
    schema = table.model.model_json_schema(by_alias=False)["properties"][key]
    unit = next((f", {_UNITS[end]}" for end in _UNITS if key == end or key.endswith(f"_{end}")), "")
    return _type(schema) + unit


def _linked(text: str) -> str:
    """Links relative to docs/ as links from docs/reference."""
    return re.sub(r"\]\((?!https?:)", "](../", text).replace("](../reference/", "](")


def _rows(table: Table, *, reloads: bool) -> Iterator[str]:
    for key in table.keys:
        cells = [f"`{key}`", described(table, key)[0], type_of(table, key), default_of(table, key)]
        if reloads:
            applied = table.heading.startswith("[[") or RELOAD_OF[table.path(key)] is Reload.APPLIES
            cells.append("applies" if applied else "restart")
        yield "| " + " | ".join(_linked(cell).replace("|", "\\|") for cell in cells) + " |"


def _introduction(table: Table) -> str:
    """What the docstring of the class says after the name of its table; "" if it does not begin with that."""
    found = re.match(r"`\[.*?\]`: (.)(.*)", " ".join((table.model.__doc__ or "").split()))
    return f"{found[1].upper()}{found[2]}" if found else ""


def _anchors(document: str) -> set[str]:
    """The headings of the document, as they are written."""
    return set(re.findall(r"^#+ `(\[.*\])`$", (TOP / "docs" / document).read_text(encoding="utf-8"), re.MULTILINE))


def reference(file: str) -> str:
    """The document on one file."""
    reloads = file == "cortex.toml"
    columns = ["key", "meaning", "type", "default", *(["on a reload"] if reloads else [])]
    explained = _anchors("configuration.md")
    lines = [
        f"# {file}",
        "",
        "<!-- Written by `python -m tests.contract.reference` from the configuration classes; do not edit. -->",
        "",
        f"{_INTRODUCTIONS[file]} [configuration.md](../configuration.md) explains the ideas and has examples.",
    ]
    for table in tables_of(FILES[file]):
        lines += ["", f"## `{table.heading}`" if table.heading else "## Top level", ""]
        if introduction := _introduction(table):
            lines += [introduction, ""]
        if table.heading in explained:
            anchor = re.sub(r"[^\w-]", "", table.heading).lower()
            lines += [f"Explained in [configuration.md](../configuration.md#{anchor}).", ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *_rows(table, reloads=reloads)]
    return wrapped("\n".join(lines) + "\n")


def path_of(file: str) -> Path:
    """Where the document on the file is."""
    return TOP / "docs" / "reference" / file.replace(".toml", ".md")


if __name__ == "__main__":
    for name in FILES:
        path_of(name).parent.mkdir(exist_ok=True)
        path_of(name).write_text(reference(name), encoding="utf-8")
