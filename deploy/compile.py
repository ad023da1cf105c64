"""The build hook that compiles the request path with mypyc (docs/relay.md).

`CORTEX_COMPILE` chooses: `auto` (the default) compiles if there is a C compiler and installs plain Python otherwise,
`yes` fails instead, `no` never compiles. Editable installs are never compiled.

Python prefers a compiled module to its source, so compilation happens in a copy: a compiled module in the checkout
would hide every edit.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD_TOOLS = ["mypy>=2.4,<3", "setuptools"]


class CompileError(Exception):
    """The request path was not compiled; the message says why."""


class CompileHook(BuildHookInterface[Any]):
    """`compiled` in the hook's table of pyproject.toml lists the modules."""

    def dependencies(self) -> list[str]:
        """What the build environment needs: nothing if the build is going to be plain Python anyway.

        mypyc reads the types of the runtime dependencies, so they are part of it.
        """
        if _mode() == "no" or (_mode() == "auto" and _obstacle() is not None):
            return []
        return [*BUILD_TOOLS, *self.metadata.core.dependencies]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the compiled modules to the wheel.

        Raises:
            CompileError: CORTEX_COMPILE is `yes` and compilation failed.
        """
        self._copy: Path | None = None
        if version == "editable" or _mode() == "no":
            return
        self._copy = Path(tempfile.mkdtemp(prefix="cortex-compile-"))
        try:
            self._compile(self._copy)
        except CompileError as error:
            if _mode() == "yes":
                self._remove_copy()
                raise
            self._warn(f"cortex-neuron: request path not compiled, installing plain Python: {error}")
            return
        for library in self._copy.rglob("*.so"):
            build_data["force_include"][str(library)] = str(library.relative_to(self._copy))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._remove_copy()

    def _compile(self, copy: Path) -> None:
        obstacle = _obstacle()
        if obstacle is not None:
            raise CompileError(obstacle)
        for package in ("cortex", "shared"):
            shutil.copytree(Path(self.root, package), copy / package, ignore=shutil.ignore_patterns("*.so"))
        result = subprocess.run(
            [sys.executable, "-m", "mypyc", "--ignore-missing-imports", *self.config["compiled"]],
            cwd=copy,
            env={**os.environ, "MYPYC_OPT_LEVEL": "3", "MYPYC_DEBUG_LEVEL": "0"},  # symbols are 40 % of the library
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        shutil.rmtree(copy / "build", ignore_errors=True)
        if result.returncode != 0:
            sys.stderr.write(result.stdout)
            last_line = (result.stdout.strip().splitlines() or ["no output"])[-1]
            raise CompileError(f"mypyc exited with status {result.returncode}: {last_line[:160]}")

    def _warn(self, line: str) -> None:
        """Shows the line also on the terminal: pip prints what a build says only with -v."""
        self.app.display_warning(line)
        if not sys.stderr.isatty():
            with contextlib.suppress(OSError), Path("/dev/tty").open("w") as terminal:
                terminal.write(f"\n{line}\n")

    def _remove_copy(self) -> None:
        if self._copy is not None:
            shutil.rmtree(self._copy, ignore_errors=True)


def _mode() -> str:
    mode = os.environ.get("CORTEX_COMPILE", "auto")
    if mode not in ("auto", "yes", "no"):
        raise ValueError(f"CORTEX_COMPILE must be auto, yes or no, got {mode!r}")
    return mode


def _obstacle() -> str | None:
    """Why nothing can be compiled here: no C compiler or no Python headers. None if both are there."""
    compiler = (shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc") or ["cc"])[0]
    if shutil.which(compiler) is None:
        return f"no C compiler ({compiler} not found)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"no Python headers ({header} not found)"
