"""The import contracts of pyproject.toml: layers, purity, no cycles."""

from __future__ import annotations

import subprocess
import sys

from tests.contract.documents import TOP

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def test_import_contracts_hold() -> None:
    """Imports that only type checkers see count too, and no import is exempt. In a process of its own: the linter
    reconfigures logging."""
    assert "ignore_imports" not in (TOP / "pyproject.toml").read_text(encoding="utf-8")
    command = [sys.executable, "-c", LINT]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
