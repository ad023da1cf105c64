"""Whether an engine serves, and whether it is ours that does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp

from shared.tasks import timeout

FIRST_PAUSE_SECS = 0.1
LONGEST_PAUSE_SECS = 0.5
HINTED_PAUSE_SECS = 0.02
_ASK = aiohttp.ClientTimeout(total=5)


async def until_ready(
    session: aiohttp.ClientSession,
    url: str,
    *,
    health_path: str,
    api_key: str,
    owns_port: Callable[[], Awaitable[bool]],
    hint: asyncio.Event | None = None,
) -> None:
    """Returns once the engine at `url` is healthy and is ours: one of its processes listens on the port, or, where
    that cannot be seen (an engine in a container), it has shown that it was given `api_key`.

    Retries after growing pauses. `hint`, set when the engine's output says that it is up, ends the present pause and
    restarts them from a short one: an engine may say so a few milliseconds before it listens. Only its answer counts.

    Has no deadline of its own: the caller watches the clock and the process.
    """
    pause, awaited = FIRST_PAUSE_SECS, hint
    while not (
        await _status(session, url + health_path) == 200
        and (await owns_port() or await knows_key(session, url, api_key))
    ):
        if await _hinted(awaited, pause):
            pause, awaited = HINTED_PAUSE_SECS, None
        else:
            pause = min(pause * 1.2, LONGEST_PAUSE_SECS)


async def _hinted(hint: asyncio.Event | None, secs: float) -> bool:
    """Pauses for `secs`, or until the hint comes: then True."""
    if hint is None:
        await asyncio.sleep(secs)
        return False
    try:
        async with timeout(secs):
            await hint.wait()
    except asyncio.TimeoutError:
        return False
    return True


async def knows_key(session: aiohttp.ClientSession, url: str, api_key: str) -> bool:
    """True when what answers at `url` takes this key and wants one: a stranger on the port does not know it, and one
    that answers any caller is not ours either."""
    listing = url + "/v1/models"
    with_key = await _status(session, listing, {"Authorization": f"Bearer {api_key}"})
    return with_key == 200 and await _status(session, listing) == 401


async def _status(session: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None) -> int | None:
    """The status of a GET, None when there was no answer."""
    try:
        async with session.get(url, headers=headers, timeout=_ASK, allow_redirects=False) as response:
            return response.status
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
        return None
