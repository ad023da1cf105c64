"""Why a load failed, and whether the host or the model is at fault. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from neuron.errors import LoadFailed, with_last_lines
from neuron.harness.base import Harness
from shared.errors import ServiceError
from shared.protocol import ErrorCode, FailureCause

_BY_CODE: dict[str, FailureCause] = {
    ErrorCode.CUDA_UNAVAILABLE: FailureCause.NODE,
    ErrorCode.GROUP_UNREACHABLE: FailureCause.NODE,
    ErrorCode.INSUFFICIENT_RAM: FailureCause.NODE,
    ErrorCode.INSUFFICIENT_VRAM: FailureCause.NODE,
    ErrorCode.LOAD_TIMEOUT: FailureCause.NODE,
    ErrorCode.NEURON_STOPPING: FailureCause.NODE,
    ErrorCode.NO_FREE_PORT: FailureCause.NODE,
    ErrorCode.VRAM_NOT_RELEASED: FailureCause.NODE,
    ErrorCode.INVALID_REQUEST: FailureCause.MODEL,
}
_HOST_FIELDS = ("devices", "harness", "tensor_parallel", "parallel")
"""Fields of a load command whose valid values depend on the host."""
_NOT_STARTED = (126, 127)  # a shell's exit codes: cannot execute, or command not found


def cause_of(error: ServiceError) -> FailureCause:
    """The cause of a load error: as set with `because`, else from its parameter or code."""
    given = error.extra.get("cause")
    if given is not None:
        return FailureCause(given)
    if error.param in _HOST_FIELDS:
        return FailureCause.NODE
    return _BY_CODE.get(error.code, FailureCause.UNKNOWN)


def because(cause: FailureCause, *, permanent: bool = False) -> dict[str, str | bool]:
    """The value for `extra` of an error."""
    return {"cause": cause.value, "permanent": True} if permanent else {"cause": cause.value}


def is_permanent(error: ServiceError) -> bool:
    """True if the load would fail here again: as set with `because`, or since the model is at fault."""
    return error.extra.get("permanent") is True or cause_of(error) is FailureCause.MODEL


def cause_of_end(harness: Harness, code: int | None, lines: Sequence[str], *, path_missing: bool) -> FailureCause:
    """The cause for an engine that ended by itself. `code` is its exit code (negative: a signal; None: unknown),
    `lines` its last output. `path_missing`: see `Harness.cause_of`."""
    if code == -signal.SIGKILL or code in _NOT_STARTED:
        return FailureCause.NODE
    error = harness.root_cause(lines)
    if error is None:
        return FailureCause.NODE if path_missing else FailureCause.UNKNOWN
    return harness.cause_of(error, path_missing=path_missing)


def is_permanent_end(harness: Harness, code: int | None, lines: Sequence[str], *, path_missing: bool) -> bool:
    """True if an engine that ended by itself would do so again. Arguments: see `cause_of_end`."""
    if code == -signal.SIGKILL:
        return False
    error = harness.root_cause(lines)
    return path_missing if error is None else harness.is_permanent(error, path_missing=path_missing)


def error_of_end(harness: Harness, code: int | None, lines: Sequence[str], *, path_missing: bool) -> LoadFailed:
    """For an engine that ended by itself. Arguments: see `cause_of_end`."""
    permanent = is_permanent_end(harness, code, lines, path_missing=path_missing)
    cause = cause_of_end(harness, code, lines, path_missing=path_missing)
    reason = exit_reason(harness, code, lines)
    return LoadFailed(with_last_lines(reason, lines), extra=because(cause, permanent=permanent))


def exit_reason(harness: Harness, code: int | None, lines: Sequence[str]) -> str:
    """Why an engine ended by itself. `code` is its exit code (negative: a signal; 0 is possible; None: unknown, since
    an earlier neuron started it)."""
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
