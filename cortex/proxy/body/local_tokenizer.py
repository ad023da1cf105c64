"""Finds a model's tokenizer on cortex's own host. Blocks; reads the disk only, never the network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from cortex.proxy.body.prompt_size import LONGEST_TOKEN_CHARS, longest_token

_NAME: Final = "tokenizer.json"
_MAX_BYTES: Final = 64 << 20


def longest_token_chars(source: str, environ: Mapping[str, str] = os.environ) -> int:
    """The characters of the longest token of the model that an engine loads for `source`, a directory or a name in the
    hub's cache; LONGEST_TOKEN_CHARS if its tokenizer is not on this host."""
    try:
        path = _tokenizer_of(source, environ)
        return LONGEST_TOKEN_CHARS if path is None else _longest(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):  # a name with a null character
        return LONGEST_TOKEN_CHARS


@lru_cache(maxsize=64)
def _longest(path: Path, _changed: int) -> int:
    data = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else b""
    return longest_token(data) or LONGEST_TOKEN_CHARS


def _tokenizer_of(source: str, environ: Mapping[str, str]) -> Path | None:
    directory = Path(source) if source.startswith("/") else _in_hub_cache(source, environ)
    path = directory / _NAME
    return path if path.is_file() else None


def _in_hub_cache(name: str, environ: Mapping[str, str]) -> Path:
    home = environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    cache = Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    model = cache / f"models--{name.replace('/', '--')}"
    return model / "snapshots" / (model / "refs" / "main").read_text(encoding="utf-8").strip()
