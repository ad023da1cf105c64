"""Whether an engine serves on its URL, and whether that is really our engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import aiohttp
import psutil
from yarl import URL

from neuron.engine.output import EngineOutput
from neuron.engine.session import Leader, work_of
from neuron.progress.stale_locks import stale_locks
from neuron.progress.stall import IdleTime, LoadWork, reported_after
from shared.protocol.context_length import length_in
from shared.tasks import timeout

CONNECT_PAUSE_SECS = (0.005, 0.02)
"""First and longest pause between two attempts to connect: the kernel refuses one in 0.1 ms of CPU."""
HEALTH_PAUSE_SECS = (0.02, 0.1)
"""First and longest pause between two health checks of an engine that is not healthy yet."""
_GROWTH = 1.2
_STALL_POLL_SECS = 5.0
_TIMEOUT = aiohttp.ClientTimeout(total=5)
_CONNECT_SECS = 5.0


TellIdle: TypeAlias = Callable[[float | None, str], None]


async def until_ready(
    session: aiohttp.ClientSession,
    url: str,
    *,
    health_path: str,
    api_key: str | None,
    model_id: str,
    owns_port: Callable[[], Awaitable[bool | None]],
    api_prefix: str = "",
    hint: asyncio.Event | None = None,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Returns once the engine at `url` is healthy and is ours: it accepts `api_key` and nothing else, or, if it takes
    requests without a key, one of its processes listens on the port. The key first: finding who listens reads a table
    of all connections of the host. `owns_port` answers None when it cannot see who listens (an engine in a container);
    then an engine without a key is ours if it serves `model_id`. `api_prefix` is what its API has before `/v1`.

    Tries to connect until the port is open, then checks the health at once and after increasing pauses. The caller sets
    `hint` at each line of output since the engine said that it is up; it ends the present pause and resets the pauses
    to the shortest, because an engine may log this a few milliseconds before it listens. Calls `on_answer` when the
    engine has answered a health check, with any status.

    Has no timeout: the caller watches the clock and the process.
    """
    addresses = await _addresses_of(URL(url))
    if addresses:
        await _retry(lambda: _is_open(addresses), CONNECT_PAUSE_SECS, hint)

    async def serves() -> bool:
        status = await _status(session, url + health_path, _key_headers(api_key))
        if status is not None:
            on_answer()
        return status == 200 and await _is_ours(session, url + api_prefix, api_key, model_id, owns_port)

    await _retry(serves, HEALTH_PAUSE_SECS, hint)


async def until_stalled(
    leader: Leader,
    output: EngineOutput,
    *,
    health_path: str,
    checks: Callable[[], int],
    timeout_secs: float,
    tell: TellIdle,
    cache_variables: Mapping[str, str],
) -> str:
    """Returns, with the reason, once the processes of a load have had no output, no CPU time and no I/O for
    `timeout_secs` (0: never). Calls `tell` with the seconds and a text when they have done nothing for part of that
    time (`stall.reported_after`), and with None when they work again. Answers to health checks, `checks()` so far, and
    access lines about them do not count as work. The reason names locks that a killed build has left behind;
    `cache_variables`: as `Harness.cache_variables`."""
    tells_after, access = reported_after(timeout_secs), f"GET {health_path} "
    with output.counting(lambda line: access not in line) as lines:

        async def work() -> LoadWork:
            return LoadWork(await asyncio.to_thread(work_of, leader), await lines.now(), checks())

        idle = IdleTime(await work(), time.monotonic())
        locks: str | None = None  # None: nothing is told at present
        while True:
            await asyncio.sleep(min(_STALL_POLL_SECS, tells_after / 4))
            secs = idle.observe(await work(), time.monotonic())
            if secs < tells_after:
                if locks is not None:
                    locks = None
                    tell(None, "")
                continue
            if locks is None:
                locks = await asyncio.to_thread(_stale_locks_of, leader, cache_variables)
            ended = bool(timeout_secs) and secs >= timeout_secs
            reason = f"no output, CPU time or I/O of the engine for {timeout_secs if ended else secs:.3g} s{locks}"
            if ended:
                return reason
            tell(secs, reason + (f"; it is ended after {timeout_secs:g} s" if timeout_secs else ""))


def _stale_locks_of(leader: Leader, cache_variables: Mapping[str, str]) -> str:
    """In words; empty if there are none."""
    with contextlib.suppress(psutil.Error):
        found = stale_locks(psutil.Process(leader.pid).environ(), cache_variables)
        if found:
            files = ", ".join(map(str, found))
            return f"; no process holds the lock {files}: if a killed build or download left it, delete it"
    return ""


async def _retry(
    attempt: Callable[[], Awaitable[bool]], pauses: tuple[float, float], hint: asyncio.Event | None
) -> None:
    """Repeats `attempt` until it is true."""
    shortest, longest = pauses
    pause = shortest
    while not await attempt():
        pause = shortest if await _hinted(hint, pause) else min(pause * _GROWTH, longest)


async def _addresses_of(url: URL) -> list[tuple[int, tuple[Any, ...]]]:
    """Address families and socket addresses; empty if the name cannot be resolved."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(family, address) for family, *_, address in found]


async def _is_open(addresses: Sequence[tuple[int, tuple[Any, ...]]]) -> bool:
    """True when something listens on one of the addresses."""
    for family, address in addresses:
        with contextlib.suppress(OSError, asyncio.TimeoutError), socket.socket(family, socket.SOCK_STREAM) as attempt:
            attempt.setblocking(False)
            async with timeout(_CONNECT_SECS):
                await asyncio.get_running_loop().sock_connect(attempt, address)
            # Without a listener, an attempt on a port of the ephemeral range may connect to itself.
            if attempt.getsockname() != attempt.getpeername():
                return True
    return False


async def _hinted(hint: asyncio.Event | None, secs: float) -> bool:
    """Waits for `secs` or for the hint, and clears it; True when it came."""
    if hint is None:
        await asyncio.sleep(secs)
        return False
    try:
        async with timeout(secs):
            await hint.wait()
    except asyncio.TimeoutError:
        return False
    hint.clear()
    return True


async def _is_ours(
    session: aiohttp.ClientSession,
    url: str,
    api_key: str | None,
    model_id: str,
    owns_port: Callable[[], Awaitable[bool | None]],
) -> bool:
    if api_key is not None and await knows_key(session, url, api_key):
        return True
    owned = await owns_port()
    return await _serves(session, url, model_id) if owned is None and api_key is None else bool(owned)


async def _serves(session: aiohttp.ClientSession, url: str, model_id: str) -> bool:
    """True when the server at `url` lists the model, as any OpenAI server does."""
    try:
        async with session.get(url + "/v1/models", timeout=_TIMEOUT, allow_redirects=False) as response:
            listed = (await response.json(content_type=None))["data"]
            return any(entry["id"] == model_id for entry in listed)
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError, LookupError, TypeError):
        return False


def _key_headers(api_key: str | None) -> dict[str, str] | None:
    return None if api_key is None else {"Authorization": f"Bearer {api_key}"}


async def knows_key(session: aiohttp.ClientSession, url: str, api_key: str) -> bool:
    """True when the server at `url` accepts this key and refuses requests without one, as only our engine does."""
    listing = url + "/v1/models"
    key = _key_headers(api_key)
    with_key, without = await asyncio.gather(_status(session, listing, key), _status(session, listing))
    return (with_key, without) == (200, 401)


async def context_length(
    session: aiohttp.ClientSession, url: str, api_key: str | None, model_id: str, field: str
) -> int | None:
    """The tokens that the engine at `url` says it serves of the model; None if it does not say. `field`: see
    `length_in`."""
    key = _key_headers(api_key)
    try:
        async with session.get(url + "/v1/models", headers=key, timeout=_TIMEOUT, allow_redirects=False) as response:
            return length_in(model_id, await response.json(content_type=None), field)
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
        return None


async def _status(session: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None) -> int | None:
    """The status of a GET; None when there was no answer."""
    try:
        async with session.get(url, headers=headers, timeout=_TIMEOUT, allow_redirects=False) as response:
            return response.status
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
        return None
