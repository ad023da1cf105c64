"""A model's tokenizer on cortex's own host: where its file is, and what cortex must know of it. Blocks; reads the disk
only, never the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

MAX_TOKENIZER_BYTES: Final = 64 << 20
"""A tokenizer.json beyond that is not read."""

_OWN_FORMAT: Final = ("tekken.json", "tokenizer.model.v*")
"""With these vLLM may use Mistral's library instead of tokenizer.json."""


log = logging.getLogger(__name__)


class LocalTokenizer(msgspec.Struct, frozen=True):
    """The tokenizer.json at `path`, as it was when it and its tokenizer_config.json had these modification times."""

    path: str
    changed: tuple[int, int]  # ns
    longest_token: int
    """Characters of the longest token in the file."""
    added_tokens: tuple[str, ...] = ()
    """Tokens that tokenizer_config.json names; tokenizer.json may lack some."""
    special_tokens: int | None = None
    """How many special tokens tokenizer_config.json puts around each prompt; None if it leaves that to
    tokenizer.json."""


def local_tokenizer(source: str, environ: Mapping[str, str] = os.environ) -> LocalTokenizer | None:
    """The tokenizer of the model that an engine loads for `source`, a directory or a name in the hub's cache; None if
    it is not on this host, cannot be read, or if the engine may use another one."""
    try:
        directory = Path(source) if source.startswith("/") else _in_hub_cache(source, environ)
        path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
        changed = path.stat().st_mtime_ns, config.stat().st_mtime_ns if config.exists() else 0
        return _read(path, config, changed)
    except (OSError, ValueError, RuntimeError):  # a name with a null character; a user without a home directory
        return None


def _in_hub_cache(name: str, environ: Mapping[str, str]) -> Path:
    home = environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    cache = Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    model = cache / f"models--{name.replace('/', '--')}"
    return model / "snapshots" / (model / "refs" / "main").read_text(encoding="utf-8").strip()


class _Model(msgspec.Struct):
    vocab: msgspec.Raw = msgspec.Raw(b"null")


class _Added(msgspec.Struct):
    content: str = ""


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []


@lru_cache(maxsize=64)
def _read(path: Path, config: Path, changed: tuple[int, int]) -> LocalTokenizer | None:
    if path.stat().st_size > MAX_TOKENIZER_BYTES or any(any(path.parent.glob(name)) for name in _OWN_FORMAT):
        return None
    tokenizer, settings = path.read_bytes(), config.read_bytes() if changed[1] else b"{}"
    try:
        return _parsed(str(path), changed, tokenizer, settings)
    except (TypeError, ValueError, RecursionError) as error:
        log.warning("cannot use %s and its tokenizer_config.json to judge prompts: %s", path, error)
        return None


def _parsed(path: str, changed: tuple[int, int], tokenizer: bytes, config: bytes) -> LocalTokenizer | None:
    settings = msgspec.json.decode(config, type=dict[str, Any])
    if "AutoTokenizer" in (settings.get("auto_map") or ()):  # code of the model's own
        return None
    added = tuple(_named_tokens(settings))
    longest = _longest_token(tokenizer, added)
    return None if longest is None else LocalTokenizer(path, changed, longest, added, _special_tokens(settings))


def _longest_token(tokenizer: bytes, added: tuple[str, ...]) -> int | None:
    """In characters; None if it has no vocabulary."""
    found = msgspec.json.decode(tokenizer, type=_Tokenizer)
    vocabulary = msgspec.json.decode(found.model.vocab)
    if isinstance(vocabulary, list):  # of pairs, with the token first
        vocabulary = [pair[0] for pair in vocabulary if isinstance(pair, list) and pair]
    if not isinstance(vocabulary, (dict, list)) or not vocabulary:
        return None
    tokens = [*vocabulary, *added, *(token.content for token in found.added_tokens)]
    return max((len(token) for token in tokens if isinstance(token, str)), default=None)


def _named_tokens(settings: Mapping[str, Any]) -> set[str]:
    """The tokens that a tokenizer_config.json names, each as a string or a table with its `content`."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        tokens = settings.get(key) or ()
        named += tokens.values() if isinstance(tokens, dict) else tokens
    texts = (token.get("content") if isinstance(token, dict) else token for token in named)
    return {text for text in texts if isinstance(text, str) and text}


def _special_tokens(settings: Mapping[str, Any]) -> int | None:
    flags = ("add_bos_token", "add_eos_token")
    if not any(flag in settings for flag in flags):
        return None
    return sum(settings.get(flag) is True for flag in flags)
