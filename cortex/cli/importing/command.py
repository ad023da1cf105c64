"""`cortex import`: reads the file, writes models.toml, and prints what to do next."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from cortex.cli.importing.carried import CarriedOver, drop_invalid, models_toml, one_line
from cortex.cli.importing.litellm import read_litellm
from cortex.cli.importing.llama_swap import read_llama_swap
from cortex.cli.importing.ollama import read_directory, read_list
from shared.terminal.command_line import fail
from shared.terminal.wording import counted

Program: TypeAlias = Literal["llama-swap", "litellm", "ollama"]

_PRESETS = {"llama": "llama.cpp", "sglang": "sglang", "infinity": "infinity"}


def run_import(program: Program, source: Path, output: Path, *, force: bool, as_json: bool) -> int:
    """Writes `output` (standard output for `-`); the exit status."""
    to_stdout = str(output) == "-"
    if to_stdout and as_json:
        fail("cortex", "--json needs --output FILE: standard output cannot have both")
    if not to_stdout and not force and output.exists():
        fail("cortex", f"{output} exists: name another file with --output, or replace it with --force")
    try:
        found = _read(program, source)
        drop_invalid(found)
        if not found.models:
            _report(found, sys.stderr.write)
            fail("cortex", f"{source} has no model that cortex can serve; {output} is not written")
        text = models_toml(found, f"{program}'s {source}")
        if not to_stdout:
            output.write_text(text, encoding="utf-8")
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail("cortex", f"cannot import {source}: {error}")
    if to_stdout:
        sys.stdout.write(text)
        _report(found, sys.stderr.write)
    elif as_json:
        sys.stdout.write(f"{json.dumps(_as_json(found, output), indent=2)}\n")
    else:
        models, aliases = counted(len(found.models), "model"), counted(len(found.aliases), "alias", "aliases")
        sys.stdout.write(f"{output}: {models}, {aliases}\n")
        _report(found, sys.stdout.write)
    return 0


def _read(program: Program, source: Path) -> CarriedOver:
    if program == "ollama":
        return read_directory(source) if source.is_dir() else read_list(_text(source))
    config = yaml.safe_load(_text(source))
    if not isinstance(config, dict):
        raise ValueError(f"it is not a configuration of {program}")  # noqa: TRY004 - of the file's contents
    return (read_llama_swap if program == "llama-swap" else read_litellm)(config)


def _text(source: Path) -> str:
    return sys.stdin.read() if str(source) == "-" else source.read_text(encoding="utf-8")


def _report(found: CarriedOver, write: Callable[[str], object]) -> None:
    if found.notes:
        write("\nNot carried over as it was:\n")
    for note in found.notes:
        write(f"  {one_line(f'{note.entry}: {note.text}' if note.entry else note.text)}\n")
    if found.harnesses:
        write("\nneuron.toml of each host needs:\n")
    for name in sorted(found.harnesses):
        write(f'  [harness.{name}]\n  preset = "{_PRESETS[name]}"\n')


def _as_json(found: CarriedOver, output: Path) -> Mapping[str, Any]:
    return {
        "file": str(output),
        "models": [model["id"] for model in found.models],
        "aliases": list(found.aliases),
        "notes": [{"entry": note.entry or None, "text": note.text} for note in found.notes],
        "harnesses": {name: _PRESETS[name] for name in sorted(found.harnesses)},
    }
