"""Why a load failed, in words, and whether the host or the model is at fault. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from neuron.harness.base import Harness
from shared.errors import ServiceError
from shared.protocol import ErrorCode, FailureCause

_BY_CODE: dict[str, FailureCause] = {
    ErrorCode.CUDA_UNAVAILABLE: FailureCause.NODE,
    ErrorCode.INSUFFICIENT_VRAM: FailureCause.NODE,
    ErrorCode.LOAD_TIMEOUT: FailureCause.NODE,
    ErrorCode.NEURON_STOPPING: FailureCause.NODE,
    ErrorCode.NO_FREE_PORT: FailureCause.NODE,
    ErrorCode.VRAM_NOT_RELEASED: FailureCause.NODE,
    ErrorCode.INVALID_REQUEST: FailureCause.MODEL,
}
_OF_THE_HOST = ("devices", "harness", "tensor_parallel")
"""Fields of a load command that are refused for what this host has."""
_NOT_STARTED = (126, 127)  # a shell's exit codes: cannot execute, or command not found


def cause_of(error: ServiceError) -> FailureCause:
    """Of the error of a load. What found the error may have said it (`because`); else its code tells."""
    said = error.extra.get("cause")
    if said is not None:
        return FailureCause(said)
    if error.param in _OF_THE_HOST:
        return FailureCause.NODE
    return _BY_CODE.get(error.code, FailureCause.UNKNOWN)


def because(cause: FailureCause) -> dict[str, str]:
    """For `extra` of an error."""
    return {"cause": cause.value}


def cause_of_end(harness: Harness, code: int | None, lines: Sequence[str], *, path_missing: bool) -> FailureCause:
    """Of an engine that ended by itself with exit code `code` (negative: a signal; None: not known) and whose last
    output is `lines`. `path_missing`: see `Harness.cause_of`."""
    if code == -signal.SIGKILL or code in _NOT_STARTED:
        return FailureCause.NODE
    error = harness.root_cause(lines)
    if error is None:
        return FailureCause.NODE if path_missing else FailureCause.UNKNOWN
    return harness.cause_of(error, path_missing=path_missing)


def exit_reason(harness: Harness, code: int | None, lines: Sequence[str]) -> str:
    """Why an engine that was not stopped exited with `code` (negative: a signal; 0 is possible too). None: an earlier
    neuron started it, so its exit code is unknown."""
    cause = harness.root_cause(lines)
    if code is None:
        return cause or "exited unexpectedly (exit code unknown: an earlier neuron started it)"
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        killed = f"killed by signal {-code}{hint}"
        return f"{killed}; its log says: {cause}" if cause is not None else killed
    if cause is not None:
        return cause
    said = f"; its last line: {lines[-1].strip()}" if lines else " and no output"
    return f"exited with status {code}{said}"
