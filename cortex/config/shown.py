"""The configuration as people may see it: without secrets. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "not shown"
"""Stands in the place of a secret."""

SECRET = frozenset({"token", "database", "metrics_token", "client_secret"})
"""Keys of cortex.toml whose values are secrets. A database's URL has a password."""

_USER_INFO = re.compile(r"//\S*@")  # up to the last @: a password may have a slash that should have been escaped
_SECRET_OPTION = re.compile(r"-hft|(?:.*[-_])?(?:token|secret|password|key)", re.IGNORECASE)
"""Engines' options that take a secret, such as `--hf-token`."""


def without_secrets(value: Any, key: str = "") -> Any:
    """A value as JSON has it, of this key, with HIDDEN in the place of secrets: passwords in URLs too, and values of
    options in lists of arguments."""
    if key in SECRET:
        return None if value is None else HIDDEN
    if isinstance(value, Mapping):
        return {name: without_secrets(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return _listed(value)
    return _USER_INFO.sub("//...@", value) if isinstance(value, str) else value


def _listed(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    hide = False
    for value in values:
        option, equals, _ = value.partition("=") if isinstance(value, str) else ("", "", "")
        is_secret = option.startswith("-") and _SECRET_OPTION.fullmatch(option) is not None
        if hide:
            found.append(HIDDEN)
        else:
            found.append(f"{option}={HIDDEN}" if is_secret and equals else without_secrets(value))
        hide = is_secret and not equals and not hide
    return found
