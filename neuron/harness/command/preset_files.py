"""The presets: descriptions of engines that come with neuron, a TOML file for each in `presets/`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron.harness.command.placeholders import placeholders_in
from shared.settings import read_toml

_DIRECTORY = Path(__file__).parent / "presets"


@functools.cache
def preset_names() -> tuple[str, ...]:
    """In alphabetical order. Reads the directory at the first call."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in _DIRECTORY.glob("*.toml")))


@functools.cache
def _preset(name: str) -> Mapping[str, Any]:
    return read_toml(_DIRECTORY / f"{name}.toml")


def on_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table `[harness.NAME]` with what its preset says where it says nothing itself. `env` is merged by variable. A
    `command` with a placeholder is the whole command line; without one it replaces only the program.

    Raises:
        ValueError: there is no such preset.
    """
    name = table.get("preset")
    if name is None:
        return dict(table)
    if name not in preset_names():
        raise ValueError(f"preset = {name!r}: unknown preset (known: {', '.join(preset_names())})")
    preset, own = _preset(name), dict(table)
    if isinstance(own.get("env"), dict):
        own["env"] = {**preset.get("env", {}), **own["env"]}
    if "command" in own and "arguments" not in own and placeholders_in(str(own["command"])):
        own["arguments"] = []
    return {**preset, **own}
