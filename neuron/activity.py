"""How busy the engines are, from their own metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import aiohttp

from neuron.hang import sample_of
from shared.protocol import ModelActivity

SCRAPE_TIMEOUT_SECS = 0.5
FRESH_SECS = 1.0


class ActivityMonitor:
    """Asks all engines at the same time, at most once a second however many ask. `engines` gives model id -> URL.

    An engine that does not answer in time keeps its last figures; one that never did is left out: no figure is not
    the same as idle.
    """

    def __init__(self, session: aiohttp.ClientSession, engines: Callable[[], Mapping[str, str]]) -> None:
        self._session = session
        self._engines = engines
        self._known: dict[tuple[str, str], ModelActivity] = {}
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()

    async def read(self, *, fresh_secs: float = FRESH_SECS) -> list[ModelActivity]:
        """Figures of the loaded models, at most `fresh_secs` old."""
        async with self._lock:
            engines = self._engines()
            unknown = any(item not in self._known for item in engines.items())
            if unknown or time.monotonic() - self._asked_at >= fresh_secs:
                found = await asyncio.gather(*(self._scrape(model, url) for model, url in engines.items()))
                last = self._known
                # Keyed by URL as well: figures of an engine are not those of its successor.
                self._known = {}
                for item, activity in zip(engines.items(), found, strict=True):
                    kept = activity or last.get(item)
                    if kept is not None:
                        self._known[item] = kept
                self._asked_at = time.monotonic()
            return [self._known[item] for item in self._engines().items() if item in self._known]

    async def _scrape(self, model_id: str, url: str) -> ModelActivity | None:
        try:
            timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_SECS)
            async with self._session.get(f"{url}/metrics", timeout=timeout) as response:
                return activity_of(model_id, await response.text())
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
            return None


def activity_of(model_id: str, exposition: str) -> ModelActivity | None:
    """Running and waiting requests from a metrics page of vLLM, None when it has neither."""
    sample = sample_of(exposition)
    return None if sample is None else ModelActivity(id=model_id, in_flight=sample.running, queue_depth=sample.waiting)
