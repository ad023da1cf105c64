"""Watches every neuron: a poll loop with its own deadline and an event listener for each, none waiting for another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from cortex.config import PollSettings
from cortex.fleet import Fleet
from cortex.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from shared.protocol import Discovery, ModelView
from shared.tasks import cancel_all, timeout

log = logging.getLogger(__name__)

EVENTS_RETRY_SECS = 1.0
NO_EVENTS_RETRY_SECS = 300.0
"""A neuron without `/events` may be upgraded: asked again rarely, and whenever it is a new process."""
_TURN = 0.9  # of an interval: what comes sooner after a miss is out of turn


class NodeWatch:
    """Polls one neuron, listens to its events, and tells the fleet."""

    def __init__(
        self,
        client: NeuronClient,
        fleet: Fleet,
        settings: PollSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = client.name
        self._client = client
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._wake = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None
        self._missed_at = float("-inf")
        self._instance: str | None = None  # of the process that the known discovery describes
        self._described = False  # the known discovery came from here, and not from a watch of another endpoint before
        self._retired = False

    async def poll_loop(self) -> None:
        """Polls for ever. Nodes start at random moments of the first interval, so that polls spread out."""
        await self.poll()
        pause = self._settings.interval_secs * random.random()  # noqa: S311 - spreads load, hides nothing
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(pause):
                    await self._wake.wait()
            self._wake.clear()
            await self.poll()
            pause = self._settings.interval_secs

    async def poll(self) -> None:
        """One poll, now. Callers at the same time share one."""
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll_once(), name=f"poll {self.name}")
        await asyncio.shield(self._polling)

    async def refresh(self) -> None:
        """A poll that begins after this call: what happened before it is seen."""
        if self._polling is not None and not self._polling.done():
            await asyncio.shield(self._polling)
        await self.poll()

    def use(self, settings: PollSettings) -> None:
        """Other settings, for the polls that begin from now on."""
        sooner = settings.interval_secs < self._settings.interval_secs
        self._settings = settings
        if sooner:  # spread out again: the pause that runs may be a long one
            delay = settings.interval_secs * random.random()  # noqa: S311 - as above
            asyncio.get_running_loop().call_later(delay, self.nudge)

    def retire(self) -> None:
        """Tells the fleet nothing from now on: another watch may do so, or the neuron has left the configuration."""
        self._retired = True

    async def finished(self) -> None:
        """Waits for a poll that is still under way; others may wait for it, too."""
        if self._polling is not None:
            await asyncio.wait([self._polling])

    async def close(self) -> None:
        """Ends a poll that is still under way."""
        if self._polling is not None:
            await cancel_all([self._polling])

    def nudge(self) -> None:
        """Lets the poll loop poll now instead of after its pause."""
        self._wake.set()

    async def _poll_once(self) -> None:
        try:
            async with timeout(self._settings.timeout_secs):
                await self._ask()
        except asyncio.TimeoutError:
            self._miss(f"no answer within {self._settings.timeout_secs:g} s")
        except (NeuronUnreachable, NeuronRefused) as error:
            self._miss(str(error))

    def _miss(self, reason: str) -> None:
        """Polls also come out of turn, when an event stream ends or an engine is not found: those misses say nothing
        that the last one did not, and a neuron that restarts has the whole of `unhealthy_after` intervals."""
        if self._retired:
            return
        now = self._clock()
        if now - self._missed_at >= _TURN * self._settings.interval_secs:
            self._missed_at = now
            self._fleet.miss(self.name, reason)

    async def _ask(self) -> None:
        """Health and models together; discovery once for each process of the neuron, and when it comes back."""
        started = self._clock()
        if self._retired:
            return
        node = self._fleet.snapshot().nodes[self.name]
        health, models = await asyncio.gather(self._client.health(), self._client.models())
        discovery: Discovery | None = None
        if not self._described or not node.healthy or health.instance_id != self._instance:
            discovery = await self._client.discovery()
            self._instance = discovery.instance_id or health.instance_id
        if self._retired:
            return
        self._described = True
        self._fleet.observe(self.name, started=started, health=health, models=models, discovery=discovery)

    async def listen_loop(self) -> None:
        """Listens to `/events` while the neuron is healthy and has them."""
        while True:
            await self._fleet.until(self.name, lambda node: node.healthy)
            instance = self._instance
            try:
                await self._listen()
            except NeuronRefused:
                with contextlib.suppress(asyncio.TimeoutError):
                    async with timeout(NO_EVENTS_RETRY_SECS):
                        await self._fleet.until(self.name, lambda _: self._instance != instance)  # noqa: B023 - in this round
            except NeuronUnreachable as error:
                log.debug("%s", error)
            self.nudge()
            await asyncio.sleep(EVENTS_RETRY_SECS)

    async def _listen(self) -> None:
        async with contextlib.aclosing(self._client.events()) as events:
            async for name, data in events:
                self._apply(name, data)

    def _apply(self, name: str, data: Any) -> None:
        if self._retired:
            return
        try:
            if name == "snapshot":
                for item in data if isinstance(data, list) else data["models"]:
                    self._fleet.tell(self.name, ModelView.model_validate(item))
            elif name == "model":
                view = ModelView.model_validate(data)
                known = self._fleet.snapshot().nodes[self.name].models.get(view.id)
                self._fleet.tell(self.name, view)
                if known is None or known.status != view.status:
                    self.nudge()  # VRAM has changed with it
            elif name == "removed":
                self._fleet.forget(self.name, str(data["id"]))
        except (ValidationError, LookupError, TypeError) as error:
            log.warning("neuron %s sent an event that is not the protocol's: %s", self.name, error)
