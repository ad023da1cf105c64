"""What `--version` prints."""

from __future__ import annotations

from shared import __version__, request_ids


def version_text(program: str) -> str:
    """Program, version and build, such as `cortex 0.1.0 (compiled)`. All of the request path is compiled or none is
    (deploy/compile.py)."""
    build = "pure Python" if request_ids.__file__.endswith(".py") else "compiled"
    return f"{program} {__version__} ({build})"
