"""The import contracts of pyproject.toml: layers, purity, no cycles."""

from __future__ import annotations

import pytest
from importlinter.cli import lint_imports

from tests.contract.documents import TOP


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Imports that only type checkers see count too, and no import is exempt."""
    monkeypatch.chdir(TOP)
    assert "ignore_imports" not in (TOP / "pyproject.toml").read_text(encoding="utf-8")
    failed = lint_imports(config_filename=str(TOP / "pyproject.toml"), no_cache=True)
    assert not failed, capsys.readouterr().out
