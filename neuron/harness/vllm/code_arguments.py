"""vLLM's arguments that make it run other code than its own: a model repository's, a module's, a peer's. Pure.

Read from vLLM 0.32: every place where it imports a name that an argument gives, and those where it unpickles what
another process sends. A JSON argument that a later vLLM adds is covered by the rules for values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from shared.protocol.reserved_arguments import flag_name

CODE_FLAGS = (
    "--trust-remote-code",  # runs Python files of the model repository
    "--middleware",
    "--logits-processors",
    "--model-class-overrides",
    "--tool-parser-plugin",
    "--reasoning-parser-plugin",
    "--worker-cls",
    "--worker-extension-cls",
    "--scheduler-cls",
    "--log-config-file",  # Python's logging configuration can call any function
    "--master-addr",  # torch.distributed and data parallelism unpickle what the other side sends
    "--data-parallel-address",
)
_SHORT_CODE_FLAGS = frozenset({"-dpa"})  # --data-parallel-address
_OTHER_FLAGS = frozenset({"--reasoning-parser"})
"""Flags whose full name is the beginning of a code flag's: vLLM treats these as full flags, not abbreviations."""

_CODE_KEYS = re.compile(r".*module_path|trust_remote_code|pylogging_config_file|\(\)")
_CUSTOM_CLASS = "custom_class"
"""A method of speculative decoding: the draft model's name is then that of a class."""
_IMPORT_PATH = re.compile(r"[^\W\d][\w-]*(\.[^\W\d][\w-]*)+(:[^\W\d]\w*)?")
_EXECUTOR = "--distributed-executor-backend"
_DATA_FLAGS = frozenset({"--hf-overrides", "--quantization-config", "--override-generation-config", "--pooler-config"})
"""Their values name parts of a model, which look like modules, and are never imported."""


def code_argument(args: Sequence[str]) -> str | None:
    """The first of `args` that makes vLLM run other code; None when none does.

    Like vLLM's parser it takes underscores for dashes, `--flag=value`, `--flag.key value` and abbreviations.
    """
    flag, structured = "", False
    for arg in args:
        value = arg
        if arg.startswith("-"):
            name, given, value = arg.partition("=")
            flag, keys = flag_name(arg), name.rstrip("+").split(".")[1:]
            structured = bool(keys)
            if _is_code_flag(flag) or any(map(_CODE_KEYS.fullmatch, keys)):
                return arg
            if not given:
                continue
        if _names_code(flag, value, structured=structured):
            return arg
    return None


def _is_code_flag(name: str) -> bool:
    if not name.startswith("--"):
        return name in _SHORT_CODE_FLAGS
    return name not in _OTHER_FLAGS and any(flag.startswith(name) for flag in CODE_FLAGS)


def _names_code(flag: str, text: str, *, structured: bool) -> bool:
    """True when a value of `flag` names code. `structured`: a plain string in it is one of a JSON value too."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = text.split(",")
    else:
        structured = True
    keys, strings = [], []
    for key, string in _walk(data):
        keys.append(key)
        strings.append(string)
    if any(map(_CODE_KEYS.fullmatch, keys)) or _CUSTOM_CLASS in strings:
        return True
    imports = flag not in _DATA_FLAGS and (structured or (flag != "" and _EXECUTOR.startswith(flag)))
    return imports and any(map(_IMPORT_PATH.fullmatch, strings))


def _walk(data: Any) -> Iterator[tuple[str, str]]:
    """Each key of the tables in JSON data as (key, ""), and each string in it as ("", string)."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key), ""
            yield from _walk(value)
    elif isinstance(data, list):
        for value in data:
            yield from _walk(value)
    elif isinstance(data, str):
        yield "", data
