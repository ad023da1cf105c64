"""Errors of loading, sleeping and waking that clients see."""

from __future__ import annotations

from collections.abc import Sequence

from neuron.spec import InstanceKey
from shared.errors import Conflict, NotFound, ServiceError, Unavailable, shortened
from shared.protocol import ErrorCode, FailureCause, GroupPart
from shared.retry_after import GROUP_STARTING_SECS, SERVICE_STOPPING_SECS

LAST_LINES = 20


class LoadFailed(ServiceError):
    """The engine ended, or could not be started, before it was ready."""

    default_code = ErrorCode.LOAD_FAILED


class LoadTimedOut(ServiceError):
    """The engine was not ready within `startup_timeout_secs`."""

    status = 504
    default_code = ErrorCode.LOAD_TIMEOUT


class VramNotReleased(ServiceError):
    """The engine's processes are gone, but the driver still counts their memory."""

    default_code = ErrorCode.VRAM_NOT_RELEASED


class SleepFailed(ServiceError):
    """The engine was asked to sleep and did not."""

    default_code = ErrorCode.SLEEP_FAILED


class SleepUnsettled(SleepFailed):
    """The engine did not say whether it sleeps, and may fall asleep later: it must be stopped."""


class WakeFailed(ServiceError):
    """The engine was asked to wake and did not: it must be loaded again."""

    default_code = ErrorCode.WAKE_FAILED


class GuardFailed(ServiceError):
    """The engine's development routes are open to any caller that reaches it, or closed to neuron too."""

    default_code = ErrorCode.SLEEP_UNGUARDED


class AdapterFailed(ServiceError):
    """The engine could not load or unload a LoRA adapter, or did not say whether it did."""

    default_code = ErrorCode.ADAPTER_FAILED


def adapters_unsupported(key: InstanceKey) -> Conflict:
    return Conflict(
        f"the engine of {key} takes no LoRA adapters: it was started without max_loras, so unload it and load it again",
        code=ErrorCode.ADAPTER_FAILED,
    )


def adapters_full(key: InstanceKey, limit: int, present: Sequence[str]) -> Conflict:
    return Conflict(
        f"the engine of {key} has {limit} LoRA adapters, as many as it can have, and none may be unloaded now: "
        f"{', '.join(present)}",
        code=ErrorCode.ADAPTERS_FULL,
    )


def cannot_start(program: str, error: OSError | ValueError) -> str:
    """Why the program of an engine was not started, and what to do if the host lacks it."""
    if isinstance(error, FileNotFoundError):
        return (
            f"this host has no executable {program!r}: install the engine, write the path of its program as `command` "
            "into its [harness] table of neuron.toml, and restart neuron"
        )
    if isinstance(error, PermissionError):
        return f"the user of neuron may not execute {program!r}: check the modes of the file and of its directories"
    return f"cannot start {program!r}: {error}"


def stalled(reason: str, lines: Sequence[str]) -> LoadFailed:
    """For a load that was ended because it did nothing. `lines` is its last output."""
    return LoadFailed(_with_last_line(reason, lines), extra={"cause": FailureCause.NODE.value})


def not_ready(reason: str, lines: Sequence[str]) -> LoadTimedOut:
    """For a load that took too long. `lines` is its last output."""
    return LoadTimedOut(_with_last_line(reason, lines))


def device_unusable(device: str, ended: ServiceError) -> LoadFailed:
    """For an engine that `ended` and cannot start again on its devices."""
    return LoadFailed(f"{device}; the engine ended: {ended.message}", extra={"cause": FailureCause.NODE.value})


def sleep_unsupported(what: str, why: str) -> Conflict:
    return Conflict(f"{what} cannot sleep: {why}", code=ErrorCode.SLEEP_UNSUPPORTED)


def model_busy(what: str) -> Conflict:
    return Conflict(f"{what} cannot sleep: it has requests", code=ErrorCode.MODEL_BUSY)


def insufficient_ram(model_id: str, needed_mb: int, available_mb: int, reserve_mb: int) -> Conflict:
    return Conflict(
        f"{model_id} cannot sleep: its weights need {needed_mb} MiB of this host's memory, {available_mb} MiB are "
        f"available, of which {reserve_mb} MiB are kept free",
        code=ErrorCode.INSUFFICIENT_RAM,
        extra={"needed_mb": needed_mb, "available_mb": available_mb, "reserve_mb": reserve_mb},
    )


def already_loaded(key: InstanceKey, difference: str) -> Conflict:
    return Conflict(f"{key} is already loaded with another spec: {difference}", code=ErrorCode.ALREADY_LOADED)


def load_in_progress(key: InstanceKey, difference: str) -> Conflict:
    # Not the words "already loaded": to a cortex they mean that the model can be used now.
    return Conflict(f"{key} is being loaded with another spec: {difference}", code=ErrorCode.LOAD_IN_PROGRESS)


def group_starting(key: InstanceKey, part: GroupPart, others: Sequence[InstanceKey]) -> Unavailable:
    names = ", ".join(map(str, others))
    return Unavailable(
        f"{key}: {part} would have to wait here, while {names} starts, which spans several neurons too: the two could "
        "wait for each other; try again when it has loaded",
        code=ErrorCode.GROUP_STARTING,
        retry_after=GROUP_STARTING_SECS,
    )


def load_cancelled(key: InstanceKey) -> Conflict:
    return Conflict(f"the load of {key} was cancelled: it was unloaded meanwhile", code=ErrorCode.LOAD_CANCELLED)


def stopping() -> Unavailable:
    return Unavailable("this neuron is stopping", code=ErrorCode.NEURON_STOPPING, retry_after=SERVICE_STOPPING_SECS)


def key_required(model: str, advice: str, *, retry_after: float | None = None) -> ServiceError:
    """For a caller that speaks only protocol v1: 503 with `retry_after`, 409 without."""
    message = f"the engine of {model} has a key, which a caller that speaks only protocol v1 cannot send: {advice}"
    code = ErrorCode.ENGINE_KEY_REQUIRED
    if retry_after is None:
        return Conflict(message, code=code)
    return Unavailable(message, code=code, retry_after=retry_after)


def unknown_model(model: str, what: str = "is not known here") -> NotFound:
    return NotFound(f"the model {shortened(model)!r} {what}", code=ErrorCode.MODEL_NOT_FOUND)


def unknown_instance(key: InstanceKey, known: Sequence[str]) -> NotFound:
    """`known`: the instances of the model that there are."""
    name, plural = shortened(key.instance), "" if len(known) == 1 else "s"
    return unknown_model(key.model_id, f"has no instance {name!r} here (instance{plural}: {', '.join(known)})")


def not_loaded(key: InstanceKey, state: str) -> NotFound:
    return unknown_model(str(key), f"is not loaded: it is {state}")


def no_endpoint(key: InstanceKey, part: GroupPart) -> NotFound:
    return unknown_model(str(key), f"has no endpoint here: this is {part}, ask the neuron of part 0")


def _with_last_line(reason: str, lines: Sequence[str]) -> str:
    """The last line is part of the reason, which may be shown without those that follow."""
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    return with_last_lines(reason if last is None else f"{reason}; its last line: {last}", lines)


def with_last_lines(reason: str, lines: Sequence[str]) -> str:
    """The reason, followed by the engine's last output lines."""
    if not lines:
        return reason
    return f"{reason}\nlast output lines:\n" + "\n".join(lines[-LAST_LINES:])
