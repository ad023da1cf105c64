"""Finds a model's tokenizer on cortex's own host. Blocks; reads the disk only, never the network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_NAME: Final = "tokenizer.json"


def tokenizer_of(source: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The tokenizer.json of the model that an engine loads for `source`, a directory or a name in the hub's cache; None
    if it is not on this host."""
    try:
        directory = Path(source) if source.startswith("/") else _in_hub_cache(source, environ)
        path = directory / _NAME
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name with a null character; a user without a home directory
        return None


def _in_hub_cache(name: str, environ: Mapping[str, str]) -> Path:
    home = environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    cache = Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    model = cache / f"models--{name.replace('/', '--')}"
    return model / "snapshots" / (model / "refs" / "main").read_text(encoding="utf-8").strip()
