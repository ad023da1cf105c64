"""vLLM's sleep routes, which the guard in the engine opens to neuron's control key only (`neuron.harness.vllm.guard`).

The guard also ensures that a sleep aborts no request: running requests finish first, and new ones get 503 with
`x-neuron-sleeping`. `/health` stays 200 throughout.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from neuron import errors as failures
from neuron.harness.vllm.control.request import MAX_QUOTED_CHARACTERS, NO_ANSWER, call, why

SLEEP_SECS = 120.0
WAKE_SECS = 120.0
_QUERY_SECS = 5.0


async def sleep(
    http: aiohttp.ClientSession, url: str, control_key: str, *, level: int = 1, timeout_secs: float = SLEEP_SECS
) -> None:
    """Returns when the engine at `url` sleeps: at level 1 its weights are in host memory and its KV cache is gone.

    Running requests have 10 s to finish.

    Raises:
        Conflict: `sleep_unsupported`, sleep mode is off; `model_busy`, it still has requests. It continues as before.
        SleepFailed: it does not sleep, and continues as before.
        SleepUnsettled: it did not answer, and may be falling asleep.
    """
    path = f"/sleep?level={level}&mode=wait"
    try:
        status, text = await _post(http, url + path, control_key, timeout_secs)
    except NO_ANSWER as error:
        reason = f"the engine did not confirm that it sleeps: {why(error, timeout_secs)}"
        raise failures.SleepUnsettled(reason) from error
    if status == 404:
        raise failures.sleep_unsupported("the engine", "it was not started with sleep mode")
    if status == 409:
        raise failures.model_busy("the engine")
    if status == 200 and await is_sleeping(http, url, control_key) is not False:
        return
    # vLLM stops scheduling requests before it sleeps, and does not resume when the sleep fails.
    await wake(http, url, control_key)
    raise failures.SleepFailed(f"the engine does not sleep: it answered {status} {text}".rstrip())


async def wake(http: aiohttp.ClientSession, url: str, control_key: str, *, timeout_secs: float = WAKE_SECS) -> None:
    """Returns when the engine at `url` serves; immediately when it is awake.

    Raises:
        WakeFailed: it does not, usually because its memory was taken meanwhile. What it holds is unknown: kill it.
    """
    try:
        status, text = await _post(http, url + "/wake_up", control_key, timeout_secs)
    except NO_ANSWER as error:
        raise failures.WakeFailed(f"the engine did not confirm that it is awake: {why(error, timeout_secs)}") from error
    if status != 200:
        raise failures.WakeFailed(f"the engine does not wake: it answered {status} {text}".rstrip())
    if await is_sleeping(http, url, control_key) is not False:
        raise failures.WakeFailed("the engine does not wake: it reports that it still sleeps")


async def is_sleeping(http: aiohttp.ClientSession, url: str, control_key: str) -> bool | None:
    """Whether the engine sleeps; None when it does not answer within 5 s."""
    try:
        return _sleep_state(*await _get_is_sleeping(http, url, control_key))
    except NO_ANSWER:
        return None


async def is_guarded(http: aiohttp.ClientSession, url: str, control_key: str) -> bool:
    """True when the engine accepts neuron's control key and nothing else. Call it once the engine is healthy.

    False: it does not accept the key either, so it cannot be put to sleep; everything else works.

    Raises:
        GuardFailed: it answers without the key: its development routes are open, so it must not serve.
    """
    try:
        without_key = _sleep_state(*await _get_is_sleeping(http, url, None))
    except NO_ANSWER:
        return False
    if without_key is not None:
        raise failures.GuardFailed(
            f"the engine's development routes answer without the control key: /is_sleeping answered {without_key}"
        )
    return await is_sleeping(http, url, control_key) is not None


async def _post(http: aiohttp.ClientSession, url: str, control_key: str, timeout_secs: float) -> tuple[int, str]:
    status, text = await call(http, "POST", url, control_key=control_key, secs=timeout_secs)
    return status, text[:MAX_QUOTED_CHARACTERS]


async def _get_is_sleeping(http: aiohttp.ClientSession, url: str, control_key: str | None) -> tuple[int, str]:
    return await call(http, "GET", url + "/is_sleeping", control_key=control_key, secs=_QUERY_SECS)


def _sleep_state(status: int, text: str) -> bool | None:
    """The answer of /is_sleeping; None when it is malformed."""
    try:
        answer: Any = json.loads(text) if status == 200 else None
    except ValueError:
        return None
    sleeps = answer.get("is_sleeping") if isinstance(answer, dict) else None
    return sleeps if isinstance(sleeps, bool) else None
