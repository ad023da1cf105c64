"""Why a vLLM ended, from what it printed; how far a load is stands in `vllm_phases`. Seen with vLLM 0.32."""

from __future__ import annotations

import re
from collections.abc import Sequence

# `(EngineCore pid=9) ERROR 11-23 11:11:55 [core.py:12] text`; a worker of a parallel engine is `(Worker_TP0 pid=9)`.
_RECORD = re.compile(
    r"\((?P<process>[\w-]+)(?: [^)]*)?\)\s(?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\])?\s?"
)
_EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w*\.)*(?P<name>[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure|OutOfMemory))(?::\s+(?P<text>.*))?"
)
_ENGINE_PROCESSES = ("Worker", "EngineCore")
# These only point to a cause that is told elsewhere.
_EMPTY_WORDS = ("See root cause above", "Engine core initialization failed", "EngineDeadError", "cancelled")
_MAX_CAUSE = 1000  # characters
_LOADED = re.compile(r"Model loading took (\d+(?:\.\d+)?) GiB memory")


def weights_mb(lines: Sequence[str], ranks: int) -> int | None:
    """MiB of weights on all `ranks` devices together, None when no line tells.

    Each rank holds an equal part; whether all of them print theirs, or the first alone, differs between versions.
    """
    parts = [float(found[1]) for line in lines if (found := _LOADED.search(line)) is not None]
    return round(max(parts) * 1024 * ranks) if parts else None


def root_cause(lines: Sequence[str]) -> str | None:
    """The error behind the end of an engine, None when the lines name none.

    An engine's processes fail one after another, each telling that the one below it did: the first error that a
    worker or the engine core logged is the cause. Without one it is the last error of the server itself, and else
    what the argument parser complained of.
    """
    parsed = [(*split_record(line), line) for line in lines]
    for index, (head, text, _) in enumerate(parsed):
        if head is not None and head["level"] == "ERROR" and head["process"].startswith(_ENGINE_PROCESSES):
            found = _exception(text, [after for _, after, _ in parsed[index + 1 : index + 4]])
            if found is not None:
                return found
    pointer: str | None = None
    for index in range(len(parsed) - 1, -1, -1):
        text = parsed[index][1]
        found = _exception(text, [after for _, after, _ in parsed[index + 1 : index + 4]])
        if found is None and re.match(r"[\w.]+(?: \w+)?: error: ", text):
            found = text.partition(": error: ")[2]
        if found is not None:
            if not any(words in found for words in _EMPTY_WORDS):
                return found[:_MAX_CAUSE]
            pointer = pointer or found
    return pointer


def split_record(line: str) -> tuple[re.Match[str] | None, str]:
    """The prefix of a record of vLLM's logger, None where there is none, and the text behind it."""
    head = _RECORD.match(line)
    return head, line[head.end() :] if head is not None else line


def _exception(text: str, following: Sequence[str]) -> str | None:
    """`Name: message` of a traceback's last line; of a pydantic error what it says of the value."""
    found = _EXCEPTION.fullmatch(text.rstrip())
    if found is None:
        return None
    message = found["text"] or ""
    if found["name"] == "ValidationError":
        detail = next((after.strip() for after in following if "error, " in after), None)
        if detail is not None:
            message = re.sub(r"\s*\[type=\w+, input_value=.*", "", detail.partition("error, ")[2])
            return message[:_MAX_CAUSE]
    return (f"{found['name']}: {message}" if message else found["name"])[:_MAX_CAUSE]
