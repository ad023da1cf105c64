"""Watches one loaded engine from outside: is it well, does it answer, does it work."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

import aiohttp

from neuron.config import HealthSettings
from neuron.harness.activity import ActivityProbe, RequestCounts
from shared.tasks import first_of

# Two bad answers in a row, and no more than this apart: an engine that fails is known within two seconds.
AGAIN_SECS = 0.5
ASK_TIMEOUT_SECS = 5.0
FIGURES_EVERY = 2  # of the intervals
# These come from the engine's end of the connection; any other error of the operating system is our own trouble.
_LOST = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE})


class HealthAnswer(Enum):
    """What came of a question to an engine."""

    WELL = "well"
    BAD = "bad"  # another status than 200
    REFUSED = "refused"  # no listener, or the connection was cut
    SILENT = "silent"  # no answer in time
    UNASKED = "unasked"  # the question could not be put


class Vitals:
    """One engine's health and figures, while `until_bad` runs.

    `health_path` answers 200 as long as the engine serves; `url` is where neuron reaches it. Without a `probe` nothing
    is known of its requests, and no hang is detected.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        health_path: str,
        probe: ActivityProbe[Any] | None,
        settings: HealthSettings,
    ) -> None:
        self.sample: RequestCounts | None = None
        """Its figures when last asked, None before the first answer. What did not come in time leaves it as it was."""
        self._session = session
        self._health = url + health_path
        self._url = url
        self._probe = probe
        self._settings = settings
        self._ask_secs = min(ASK_TIMEOUT_SECS, settings.unresponsive_secs)

    async def until_bad(self) -> str:
        """Returns when the engine has to be killed: why, in words. Cancel it when the engine ends of itself.

        Bad is: two answers in a row to the health check that are not 200, or refusals, or one of each; no answer to
        it for `unresponsive_secs`; a hang (`neuron.harness.activity`).
        """
        watches = [asyncio.ensure_future(self._until_unwell())]
        if self._probe is not None:
            watches.append(asyncio.ensure_future(self._until_hung(self._probe)))
        await first_of(dict(enumerate(watches)))
        return next(watch.result() for watch in watches if not watch.cancelled())

    async def take_sample(self) -> RequestCounts | None:
        """Asks for its figures now; None when they did not come."""
        probe = self._probe
        if probe is None:
            return None
        sample: RequestCounts | None = None

        async def read(response: aiohttp.ClientResponse) -> bool:
            nonlocal sample
            sample = probe.sample_of(await response.text()) if response.status == 200 else None
            return sample is not None

        await self._ask(self._url + probe.path, read)
        self.sample = sample or self.sample
        return sample

    async def _until_unwell(self) -> str:
        silent_secs, said = 0.0, ""
        while True:
            started = time.monotonic()
            answer, words = await self._ask(self._health, _is_well)
            took = time.monotonic() - started
            # As long as each question may take and no longer: neuron itself may have been stopped meanwhile.
            silent_secs = silent_secs + min(took, self._ask_secs) if answer is HealthAnswer.SILENT else 0.0
            if silent_secs >= self._settings.unresponsive_secs:
                return f"no answer to its health check for {silent_secs:.0f} s"
            pause = self._settings.interval_secs
            if answer in (HealthAnswer.BAD, HealthAnswer.REFUSED):
                if said:
                    return f"its health check {words}"
                said, pause = words, min(pause, AGAIN_SECS)
            elif answer is HealthAnswer.WELL:
                said = ""
            await asyncio.sleep(max(0.0, pause - took))

    async def _until_hung(self, probe: ActivityProbe[Any]) -> str:
        watch = probe.hang_detector(self._settings.hang_grace_secs, self._settings.prefill_grace_secs)
        while True:
            reason = watch.observe(await self.take_sample(), time.monotonic())
            if reason is not None:
                return reason
            await asyncio.sleep(self._settings.interval_secs * FIGURES_EVERY)

    async def _ask(
        self, url: str, read: Callable[[aiohttp.ClientResponse], Awaitable[bool]]
    ) -> tuple[HealthAnswer, str]:
        """A GET, and what came of it, also in words; `read` says whether the answer is as it should be."""
        timeout = aiohttp.ClientTimeout(total=self._ask_secs)
        try:
            async with self._session.get(url, timeout=timeout, allow_redirects=False) as response:
                return HealthAnswer.WELL if await read(response) else HealthAnswer.BAD, f"said {response.status}"
        except asyncio.TimeoutError:
            return HealthAnswer.SILENT, f"did not answer for {self._ask_secs:g} s"
        except OSError as error:
            if error.errno in _LOST or isinstance(error, ConnectionError):
                return HealthAnswer.REFUSED, f"was refused ({error.strerror or error})"
            return HealthAnswer.UNASKED, str(error)
        except (aiohttp.ClientError, ValueError) as error:
            return HealthAnswer.REFUSED, f"was cut off ({error})"


async def _is_well(response: aiohttp.ClientResponse) -> bool:
    return response.status == 200
