"""The presets: descriptions of engines that come with neuron, a TOML file for each in `presets/`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron.harness.command.placeholders import placeholders_in
from shared.settings import read_toml

_DIRECTORY = Path(__file__).parent / "presets"
_OTHER_PROGRAMS = "other_programs"
"""In a preset's file: words of a command line that start a related program, with the preset for that one."""


@functools.cache
def preset_names() -> tuple[str, ...]:
    """In alphabetical order. Reads the directory at the first call."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in _DIRECTORY.glob("*.toml")))


@functools.cache
def _preset(name: str) -> Mapping[str, Any]:
    return read_toml(_DIRECTORY / f"{name}.toml")


def on_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table `[harness.NAME]` with what its preset says where it says nothing itself. `env` is merged by variable. A
    `command` with a placeholder is the whole command line; without one it replaces only the program, whose own preset
    then counts if the named one refers to it.

    Raises:
        ValueError: there is no such preset.
    """
    name = table.get("preset")
    if name is None:
        return dict(table)
    if name not in preset_names():
        raise ValueError(f"preset = {name!r}: unknown preset (known: {', '.join(preset_names())})")
    own = dict(table)
    preset = _preset(_for_program(name, own.get("command")))
    if isinstance(own.get("env"), dict):
        own["env"] = {**preset.get("env", {}), **own["env"]}
    if "command" in own and "arguments" not in own and placeholders_in(str(own["command"])):
        own["arguments"] = []
    return {key: value for key, value in preset.items() if key != _OTHER_PROGRAMS} | own


def _for_program(name: str, command: object) -> str:
    """The preset `name`, or the one that it names for the program of `command`."""
    words = command.split() if isinstance(command, str) else command if isinstance(command, list) else []
    others = _preset(name).get(_OTHER_PROGRAMS, {})
    return next((preset for word, preset in others.items() if word in words), name)
