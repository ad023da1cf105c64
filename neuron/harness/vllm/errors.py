"""Why a vLLM exited, from its output, and whether the host or the model is at fault. Seen with vLLM 0.32, or in its
sources. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.protocol import FailureCause

# `(EngineCore pid=9) ERROR 11-23 11:11:55 [core.py:12] text`; a worker of a parallel engine is `(Worker_TP0 pid=9)`.
_RECORD = re.compile(
    r"\((?P<process>[\w-]+)(?: [^)]*)?\)\s(?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\])?\s?"
)
_EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w*\.)*(?P<name>[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure|OutOfMemory))(?::\s+(?P<text>.*))?"
)
# The same after another prefix, such as that of what collects the output: `2026-11-29T19:20:11Z stderr ValueError: x`.
_PREFIXED = re.compile(
    r"^.*?\s((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure|OutOfMemory): .*)"
    r"|^.*?\s([\w.]+(?: \w+)?: error: .*)"
)
_ENGINE_PROCESSES = ("Worker", "VllmWorker", "EngineCore")
# The names that loggers give to the parts of a record in JSON, the most particular first.
_PROCESS_KEYS = ("vllm_process_name", "processName", "process_name")
_LEVEL_KEYS = ("levelname", "level", "severity", "log.level")
_MESSAGE_KEYS = ("message", "msg", "event", "text")
_TRACEBACK_KEYS = ("exc_info", "exc_text", "exception", "traceback", "stack", "stack_info")
# These only point to a cause in another line.
_EMPTY_WORDS = ("See root cause above", "Engine core initialization failed", "EngineDeadError", "cancelled")
_MAX_CAUSE = 1000  # characters
_LOADED = re.compile(r"Model loading took (\d+(?:\.\d+)?) GiB memory")

# Errors of the argument parser: the same on every host.
_ARGUMENTS = re.compile(r"unrecognized arguments: |argument \S+: |the following arguments are required: ")
# Checked first: many errors that look like the model's are about what this host's devices support.
_NODE = re.compile(
    r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory"
    r"|Free memory on device|No available memory for the cache blocks|Available memory on node \d"
    r"|larger than the available KV cache memory"
    r"|CUDA (?:error|driver|version|unknown|initialization)|compiled with CUDA|CUDA-capable|cuda(?:Error|rt)|libcuda"
    r"|cuBLAS|CUBLAS|cuDNN|CUDNN|NVML|NCCL|nccl|NVIDIA driver|Failed to infer device type"
    r"|compute capability|not supported (?:for|on) (?:the )?current (?:GPU|platform)|NUMA nodes"
    r"|No space left on device|Disk quota exceeded|Read-only file system|Input/output error|Stale file handle"
    r"|Too many open files|can't start new thread|Resource temporarily unavailable"
    r"|[Aa]ddress already in use|ImportError|ModuleNotFoundError|cannot open shared object file"
    # Its files are not in this host's cache, and the hub cannot be reached from it.
    r"|LocalEntryNotFoundError|OfflineMode|ConnectionError|ConnectTimeout|ReadTimeout|couldn't connect to"
    r"|Failed core proc\(s\): \{[^}]*: -9\b"  # the kernel's OOM killer took the core
)
# The engine filled the memory that was booked for it. (What other processes take is "Free memory on device".)
_OWN_MEMORY = re.compile(
    r"CUDA out of memory|No available memory for the cache blocks|larger than the available KV cache memory"
)
_MODEL = re.compile(
    r"[Aa]rchitectures? .*not supported|does not recognize this architecture|has no vLLM implementation"
    r"|not supported in-tree|Unrecognized model in |should have a `model_type` key|No supported config format"
    r"|max_model_len \(\d+\) is greater than"
    r"|[Qq]uantization method|Cannot find the config file for "
    r"|Can't load tokenizer|Unable to load vocabulary|Couldn't instantiate the backend tokenizer"
    r"|must be divisible by tensor parallel size|trust_remote_code|Cannot find any model weights"
    r"|RepositoryNotFoundError|RevisionNotFoundError|RemoteEntryNotFoundError|HFValidationError"
    r"|not a valid model identifier|Invalid repository ID or local directory"
    r"|invalid (?:tool call|reasoning) parser"
)


def weights_mb(lines: Sequence[str], ranks: int) -> int | None:
    """MiB of weights on all `ranks` devices together; None when no line says.

    Each rank holds an equal part. Depending on the version, all ranks print theirs or only the first.
    """
    parts = [float(found[1]) for line in lines if (found := _LOADED.search(line)) is not None]
    return round(max(parts) * 1024 * ranks) if parts else None


def root_cause(lines: Sequence[str]) -> str | None:
    """The error that made an engine exit; None when the lines name none.

    An engine's processes fail one after another, each reporting that the one below it did: the cause is the first error
    that a worker or the engine core logged. Without one it is the last error of the server or the argument parser.
    """
    parsed = [part for line in lines for part in lines_of(line)]
    for index, line in enumerate(parsed):
        if line.level == "ERROR" and line.process.startswith(_ENGINE_PROCESSES):
            found = _exception(line.text, parsed[index + 1 : index + 4])
            if found is not None:
                return found
    return _last_error(parsed) or _last_error([_without_prefix(line) for line in parsed])


def _last_error(lines: Sequence[LogLine]) -> str | None:
    """The last error, if possible one that does not only point to another."""
    pointer: str | None = None
    for index in range(len(lines) - 1, -1, -1):
        text = lines[index].text
        found = _exception(text, lines[index + 1 : index + 4])
        if found is None and re.match(r"[\w.]+(?: \w+)?: error: ", text):
            found = text.partition(": error: ")[2]
        if found is not None:
            if not any(words in found for words in _EMPTY_WORDS):
                return found[:_MAX_CAUSE]
            pointer = pointer or found
    return pointer


def _without_prefix(line: LogLine) -> LogLine:
    found = _PREFIXED.match(line.text)
    return line if found is None else LogLine(found[1] or found[2])


def cause_of(error: str, *, path_missing: bool) -> FailureCause:
    """Whether the host or the model is at fault for an error from `root_cause`. `path_missing` True when the model is a
    path that does not exist on this host: it may on another."""
    if _ARGUMENTS.match(error):
        return FailureCause.MODEL
    if path_missing or _NODE.search(error):
        return FailureCause.NODE
    return FailureCause.MODEL if _MODEL.search(error) else FailureCause.UNKNOWN


def is_permanent(error: str, *, path_missing: bool) -> bool:
    """True for an error from `root_cause` that the next start on this host meets too: a wrong path, argument or model,
    or a share of memory that is too small for the model."""
    return (
        path_missing
        or _OWN_MEMORY.search(error) is not None
        or cause_of(error, path_missing=False) is FailureCause.MODEL
    )


@dataclass(frozen=True)
class LogLine:
    """A line of a record of vLLM's logger, with the process and the level that the record names."""

    text: str
    process: str = ""
    level: str = ""


def lines_of(line: str) -> Iterator[LogLine]:
    """What a line of output says: of a record in JSON its message and its traceback, line by line."""
    head = _RECORD.match(line)
    text = line if head is None else line[head.end() :]
    process, level = ("", "") if head is None else (head["process"], head["level"] or "")
    record = _json_record(text)
    if record is None:
        yield LogLine(text, process, level)
        return
    process, level = _first(record, _PROCESS_KEYS) or process, _first(record, _LEVEL_KEYS).upper() or level
    for part in (_first(record, _MESSAGE_KEYS), _first(record, _TRACEBACK_KEYS)):
        for each in part.splitlines():
            yield LogLine(each, process, level)


def _json_record(text: str) -> Mapping[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and _first(record, _MESSAGE_KEYS) else None


def _first(record: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((value for name in names if isinstance(value := record.get(name), str) and value), "")


def _exception(text: str, following: Sequence[LogLine]) -> str | None:
    """`Name: message` of a traceback's last line; for a pydantic error, its complaint about the value."""
    found = _EXCEPTION.fullmatch(text.rstrip())
    if found is None:
        return None
    message = found["text"] or ""
    if found["name"] == "ValidationError":
        detail = next((after.text.strip() for after in following if "error, " in after.text), None)
        if detail is not None:
            message = re.sub(r"\s*\[type=\w+, input_value=.*", "", detail.partition("error, ")[2])
            return message[:_MAX_CAUSE]
    return (f"{found['name']}: {message}" if message else found["name"])[:_MAX_CAUSE]
