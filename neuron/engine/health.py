"""Monitors one loaded engine: its health check, its answer times and its progress."""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

import aiohttp

from neuron.config import HealthSettings
from neuron.harness.activity import ActivityProbe, RequestCounts
from shared.tasks import first_of

# The longest pause between two failed checks, so that a failing engine is detected within two seconds.
RECHECK_SECS = 0.5
CHECK_TIMEOUT_SECS = 5.0
SAMPLE_EVERY = 2  # intervals
EXPECT_SECS = 2.0
"""How long a caller that was told the endpoint may take to send its request."""
# Caused by the engine; any other error of the operating system is neuron's own, such as no free file descriptor.
_CAUSED_BY_ENGINE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE})


class HealthAnswer(Enum):
    """The outcome of one HTTP request to an engine."""

    OK = "ok"
    ERROR = "error"  # a status other than 200
    REFUSED = "refused"  # no listener, or the connection was closed
    TIMEOUT = "timeout"
    NOT_SENT = "not sent"  # neuron could not send the request


class HealthMonitor:
    """Monitors one engine while `until_unhealthy` runs.

    `health_path` answers 200 as long as the engine serves; `url` is where neuron reaches it. Without a `probe` its
    requests are unknown and no hang is detected. `serves` False: it has no server, and counts as healthy while its
    process runs. `api_key` goes with each request: some engines ask for it at their metrics, too.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        health_path: str,
        probe: ActivityProbe[Any] | None,
        settings: HealthSettings,
        serves: bool = True,
        api_key: str | None = None,
    ) -> None:
        self.sample: RequestCounts | None = None
        """The latest activity; None before the first. A failed reading does not change it."""
        self.active_at = time.monotonic()
        """When requests last ran or ended, as far as samples show; monotonic."""
        self.told_at = -math.inf
        """When a caller was last told the endpoint; monotonic."""
        self._told = 0
        self._marks_before: tuple[float, ...] | None = None  # when it was told
        self._session = session
        self._health = url + health_path
        self._url = url
        self._serves = serves
        self._probe = probe if serves else None
        self._key = None if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._settings = settings
        self._timeout_secs = min(CHECK_TIMEOUT_SECS, settings.unresponsive_secs)

    @property
    def busy(self) -> bool:
        """True when requests ran or waited in the latest sample, or an expected one may still be on its way."""
        sample = self.sample
        if sample is not None and (sample.running or sample.waiting):
            return True
        came = sample is not None and sample.marks != (self._marks_before or (0.0,) * len(sample.marks))
        return not came and time.monotonic() < self.told_at + EXPECT_SECS

    @property
    def outstanding(self) -> int:
        """Requests that ran or waited in the latest sample, and callers that were told the endpoint since."""
        return self._told + (0 if self.sample is None else self.sample.running + self.sample.waiting)

    def expect_request(self) -> None:
        """The endpoint was told to a caller, who is about to send a request."""
        self.told_at = time.monotonic()
        self._told += 1
        self._marks_before = None if self.sample is None else self.sample.marks

    async def until_unhealthy(self) -> str:
        """Returns the reason once the engine must be killed. Cancel it when the engine exits by itself.

        The reasons: two health checks in a row that are refused or answered with a status other than 200; no answer for
        `unresponsive_secs`; a hang (`neuron.harness.activity`).
        """
        if not self._serves:
            await asyncio.get_running_loop().create_future()
        watches = [asyncio.ensure_future(self._until_check_fails())]
        if self._probe is not None:
            watches.append(asyncio.ensure_future(self._until_hung(self._probe)))
        await first_of(dict(enumerate(watches)))
        return next(watch.result() for watch in watches if not watch.cancelled())

    async def take_sample(self) -> RequestCounts | None:
        """Reads the engine's activity now; None when that fails."""
        probe = self._probe
        if probe is None:
            return None
        sample: RequestCounts | None = None

        async def read(response: aiohttp.ClientResponse) -> bool:
            nonlocal sample
            sample = probe.sample_of(await response.text()) if response.status == 200 else None
            return sample is not None

        await self._get(self._url + probe.path, read)
        if sample is not None:
            if sample.running or sample.waiting or (self.sample is not None and sample.marks != self.sample.marks):
                self.active_at = time.monotonic()
            self.sample, self._told = sample, 0
        return sample

    async def _until_check_fails(self) -> str:
        silent_secs, failure = 0.0, ""
        while True:
            started = time.monotonic()
            answer, description = await self._get(self._health, _is_ok)
            took = time.monotonic() - started
            # At most the timeout of each check: neuron itself may have been stopped meanwhile.
            silent_secs = silent_secs + min(took, self._timeout_secs) if answer is HealthAnswer.TIMEOUT else 0.0
            if silent_secs >= self._settings.unresponsive_secs:
                return f"no answer to its health check for {silent_secs:.0f} s"
            pause = self._settings.interval_secs
            if answer in (HealthAnswer.ERROR, HealthAnswer.REFUSED):
                if failure:
                    return f"its health check {description}"
                failure, pause = description, min(pause, RECHECK_SECS)
            elif answer is HealthAnswer.OK:
                failure = ""
            await asyncio.sleep(max(0.0, pause - took))

    async def _until_hung(self, probe: ActivityProbe[Any]) -> str:
        detector = probe.hang_detector(self._settings.hang_grace_secs, self._settings.prefill_grace_secs)
        while True:
            reason = detector.observe(await self.take_sample(), time.monotonic())
            if reason is not None:
                return reason
            await asyncio.sleep(self._settings.interval_secs * SAMPLE_EVERY)

    async def _get(
        self, url: str, read: Callable[[aiohttp.ClientResponse], Awaitable[bool]]
    ) -> tuple[HealthAnswer, str]:
        """The outcome of a GET, and its description; `read` returns whether the response is good."""
        timeout = aiohttp.ClientTimeout(total=self._timeout_secs)
        try:
            async with self._session.get(url, headers=self._key, timeout=timeout, allow_redirects=False) as response:
                return HealthAnswer.OK if await read(response) else HealthAnswer.ERROR, f"answered {response.status}"
        except asyncio.TimeoutError:
            return HealthAnswer.TIMEOUT, f"did not answer for {self._timeout_secs:g} s"
        except OSError as error:
            if error.errno in _CAUSED_BY_ENGINE or isinstance(error, ConnectionError):
                return HealthAnswer.REFUSED, f"was refused ({error.strerror or error})"
            return HealthAnswer.NOT_SENT, str(error)
        except (aiohttp.ClientError, ValueError) as error:
            return HealthAnswer.REFUSED, f"was cut off ({error})"


async def _is_ok(response: aiohttp.ClientResponse) -> bool:
    return response.status == 200
