"""Runs `cortex import` as a user does, and reads what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cortex.config.catalogue import Catalogue, load_catalogue
from cortex.config.files import catalogue_problems
from neuron.harness.command.preset_files import on_preset


def run(*arguments: str, stdin: str = "", cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "cortex", "import", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(Path(__file__).parents[4]), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        check=False,
    )


def imported(tmp_path: Path, program: str, text: str) -> tuple[Catalogue, dict[str, Any], list[tuple[str | None, str]]]:
    """The catalogue that is written, the tables of its models by id, and the notes; checks that cortex and neuron would
    accept it."""
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    ended = run(program, "config.yaml", "--json", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    answer = json.loads(ended.stdout)
    catalogue = load_catalogue(tmp_path / "models.toml")
    assert catalogue_problems(catalogue, tmp_path / "models.toml") == []
    reserved = set(on_preset({"preset": "llama.cpp"})["reserved_arguments"])
    for model in catalogue.models:
        assert model.harness != "llama" or reserved.isdisjoint(model.args)
    assert [model.id for model in catalogue.models] == answer["models"]
    tables = {each.id: each.model_dump(exclude_unset=True, exclude={"id"}) for each in catalogue.models}
    return catalogue, tables, [(note["entry"], note["text"]) for note in answer["notes"]]


def about(notes: list[tuple[str | None, str]], entry: str | None) -> str:
    return "\n".join(text for name, text in notes if name == entry)
