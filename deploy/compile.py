"""The build hook that compiles what every request and every chunk passes through, with mypyc (docs/relay.md).

    HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 pip install .

Without the variable, and in an editable installation, the same sources run as they are. Compiled modules come before
their sources in Python's search, so they are made in a copy: none is left in a checkout, where it would hide an edit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileHook(BuildHookInterface[Any]):
    """`compiled` in its table of pyproject.toml names the modules."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the compiled modules to the wheel. Raises CalledProcessError when they cannot be compiled."""
        if version == "editable":
            return
        self._copy = Path(tempfile.mkdtemp(prefix="cortex-compile-"))
        for package in ("cortex", "shared"):
            shutil.copytree(Path(self.root, package), self._copy / package, ignore=shutil.ignore_patterns("*.so"))
        subprocess.run(
            [sys.executable, "-m", "mypyc", *self.config["compiled"]],
            cwd=self._copy,
            env={**os.environ, "MYPYC_OPT_LEVEL": "3"},
            stdout=sys.stderr,
            check=True,
        )
        shutil.rmtree(self._copy / "build")
        for library in self._copy.rglob("*.so"):
            build_data["force_include"][str(library)] = str(library.relative_to(self._copy))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Takes the copy away."""
        if version != "editable":
            shutil.rmtree(self._copy)
