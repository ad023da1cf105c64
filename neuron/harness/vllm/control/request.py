"""Requests to the routes of vLLM that its guard opens to neuron's control key only (`neuron.harness.vllm.guard`)."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp

from neuron.harness.vllm.guard.neuron_guard import CONTROL_HEADER

MAX_QUOTED_CHARACTERS: Final = 500
"""Of an engine's answer in an error."""
NO_ANSWER: Final = (aiohttp.ClientError, OSError, asyncio.TimeoutError)


async def call(
    http: aiohttp.ClientSession,
    method: str,
    url: str,
    *,
    control_key: str | None,
    secs: float,
    api_key: str | None = None,
    body: object = None,
) -> tuple[int, str]:
    """Status and text of the answer. Raises one of NO_ANSWER if there is none within `secs`."""
    headers = {} if control_key is None else {CONTROL_HEADER: control_key}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    timeout = aiohttp.ClientTimeout(total=secs)
    async with http.request(method, url, headers=headers, json=body, timeout=timeout, allow_redirects=False) as reply:
        return reply.status, await reply.text(errors="replace")


def why(error: BaseException, secs: float) -> str:
    """What one of NO_ANSWER means, after `secs` at most."""
    if isinstance(error, asyncio.TimeoutError):
        return f"no answer within {secs:g} s"
    return str(error) or type(error).__name__
