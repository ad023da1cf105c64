"""What a new configuration changes. Pure: takes two configurations, returns the effective one and a description of
the changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig

NEEDS_RESTART = ("gateway", "state_dir", "log_level", "log_format")
"""Keys of cortex.toml that are only read at startup."""
MAX_NAMED = 40
"""Limit on changes listed in one log line."""
SECRET = frozenset({"token"})


@dataclass(frozen=True)
class Difference:
    """`config` and `catalogue` are in effect from now on: the same objects as before when nothing changed, with the
    old values for the keys in `restart`, which need a restart."""

    config: CortexConfig
    catalogue: Catalogue
    lines: tuple[str, ...]
    restart: tuple[str, ...]

    def __str__(self) -> str:
        if not self.lines:
            return "no changes"
        more = len(self.lines) - MAX_NAMED
        return ", ".join(self.lines[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def difference(
    config: CortexConfig, catalogue: Catalogue, new_config: CortexConfig, new_catalogue: Catalogue
) -> Difference:
    """The configuration in effect after replacing the first pair with the second, and what changed."""
    kept = {key: getattr(config, key) for key in NEEDS_RESTART}
    restart = [
        line
        for key, value in kept.items()
        if value != getattr(new_config, key)
        for line in _changes(key, value, getattr(new_config, key))
    ]
    effective = new_config.model_copy(update=kept)
    settings = [
        line
        for key in CortexConfig.model_fields
        if key not in NEEDS_RESTART and key != "neurons"
        for line in _changes(key, getattr(config, key), getattr(effective, key))
    ]
    neurons = _named(
        "neuron", {entry.name: entry for entry in config.neurons}, {entry.name: entry for entry in effective.neurons}
    )
    models = _named(
        "model", {model.id: model for model in catalogue.models}, {model.id: model for model in new_catalogue.models}
    )
    aliases = _named("alias", catalogue.aliases, new_catalogue.aliases)
    return Difference(
        config=config if effective == config else effective,
        catalogue=catalogue if new_catalogue == catalogue else new_catalogue,
        lines=(*neurons, *models, *aliases, *settings),
        restart=tuple(restart),
    )


def _named(kind: str, before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    """What was added, removed and changed."""
    yield from (f"+{kind} {name}" for name in after if name not in before)
    yield from (f"-{kind} {name}" for name in before if name not in after)
    for name in before:
        if name in after and before[name] != after[name]:
            yield f"{kind} {name}: {', '.join(_fields(before[name], after[name]))}"


def _fields(before: object, after: object) -> Iterable[str]:
    if isinstance(before, BaseModel) and isinstance(after, BaseModel):
        return [
            line
            for key in type(before).model_fields
            for line in _changes(key, getattr(before, key), getattr(after, key))
        ]
    return [f"{_shown(before)} -> {_shown(after)}"]


def _changes(key: str, before: object, after: object) -> list[str]:
    """One line per changed value, recursing into tables."""
    if before == after:
        return []
    if key in SECRET:
        return [f"{key} changed"]
    if isinstance(before, BaseModel) and isinstance(after, BaseModel):
        return [
            line
            for inner in type(before).model_fields
            for line in _changes(f"{key}.{inner}", getattr(before, inner), getattr(after, inner))
        ]
    return [f"{key} {_shown(before)} -> {_shown(after)}"]


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return str(value.model_dump(exclude_none=True))
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value) if isinstance(value, tuple) else value)
