"""cortex with its request path compiled, as in the container image. Built once for each state of the sources."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.contenders.contender import ContenderUnavailable
from tests.environment.cache import EnvironmentUnavailable, key_of, prepared
from tests.environment.commands import run

_BUILD_SECS = 600
_MADE_OF = ("pyproject.toml", "deploy/compile.py", "cortex/**/*.py", "shared/**/*.py", "neuron/**/*.py")
SWITCH = {"CORTEX_COMPILE": "yes"}


def compiled(checkout: Path) -> Path:
    """A directory for PYTHONPATH with the packages of this checkout, about 5 MB.

    Raises:
        ContenderUnavailable: compilation failed, usually because there is no C compiler.
    """

    def build(directory: Path) -> None:
        pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        run([*pip, "--target", directory, checkout], timeout=_BUILD_SECS, env={**os.environ, **SWITCH})

    sources = sorted(path for pattern in _MADE_OF for path in checkout.glob(pattern))
    parts = [part for path in sources for part in (str(path.relative_to(checkout)), path.read_bytes())]
    try:
        return prepared(f"compiled-{key_of(sys.version, *parts)}", build)
    except EnvironmentUnavailable as error:
        raise ContenderUnavailable(f"cortex cannot be compiled: {str(error)[-300:]}") from error
