"""Polls one neuron and listens to its events, independently of the other neurons.

While events arrive they report model changes, and a poll requests only `/health`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cortex.config.settings import PollSettings
from cortex.fleet.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineName, instance_of
from cortex.fleet.state import Fleet
from cortex.upstream.connection import CLOSED
from shared.protocol import Discovery, ModelView, NeuronHealth
from shared.tasks import cancel_all, timeout

log = logging.getLogger(__name__)

EVENTS_RETRY_SECS = 1.0
NO_EVENTS_RETRY_SECS = 300.0
"""How often to retry `/events` on a neuron without it, besides after each restart: it may be upgraded."""
FULL_EVERY = 15
"""One poll in this many requests the models even while events arrive, to recover from lost events."""
MEASURED_POLLS = 2
"""This many polls request the models after a change: the neuron measures device memory a moment later."""
POLL_SLOTS = 200
"""Polls start at this many points of an interval: grouped polls cost fewer wake-ups."""
_GOLDEN = 0.6180339887498949
_TLS_HINT = " without an answer; if this is a TLS port, the endpoint needs https://"
_MISS_SPACING = 0.97  # of an interval: a poll sooner than this after a miss is an extra one


def poll_offset(position: int, interval_secs: float) -> float:
    """When in the interval a neuron is polled, in seconds from its start. Multiples of the golden ratio spread any
    number of neurons evenly, also when neurons are added."""
    return interval_secs * int(position * _GOLDEN % 1 * POLL_SLOTS) / POLL_SLOTS


@dataclass
class PollCounts:
    """Polls of one neuron: those that were answered, how long these took together, and those that failed."""

    answered: int = 0
    answer_secs: float = 0.0
    failed: int = 0


class NeuronPoller:
    """Polls one neuron, listens to its events, and updates the fleet's state."""

    def __init__(
        self,
        client: NeuronClient,
        fleet: Fleet,
        settings: PollSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = client.name
        self.counts = PollCounts()
        self._client = client
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._wake = asyncio.Event()
        self._polling: asyncio.Future[None] | None = None
        self._missed_at = float("-inf")
        self._instance: str | None = None  # of the process that the known discovery describes
        self._devices: frozenset[int] = frozenset()  # that answered when the discovery was requested
        # The known discovery came from here, and not from a watch of another endpoint before.
        self._discovery_known = False
        self._stopped = False
        self._listening = False  # events arrive, and the first one listed all models
        self._model_polls_due = 0  # polls to come that request the models even while events arrive
        self._polls_without_models = 0  # since the last poll that requested them
        self._active: frozenset[EngineName] = frozenset()  # in the last health answer

    async def poll_loop(self) -> None:
        """Polls. Never returns."""
        loop = asyncio.get_running_loop()
        await self.poll()
        while True:
            timer = loop.call_later(self._pause(), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
            self._wake.clear()
            await self._poll_here()

    def _pause(self) -> float:
        """Seconds until this neuron's next poll, never much less than half an interval after the last one."""
        interval = self._settings.interval_secs
        pause = interval - (self._clock() - poll_offset(self._fleet.position(self.name), interval)) % interval
        return pause if pause > interval / 2 else pause + interval

    async def poll(self) -> None:
        """One poll, now. Callers at the same time share one."""
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll_once(), name=f"poll {self.name}")
        await asyncio.shield(self._polling)

    async def _poll_here(self) -> None:
        """As `poll`, for the poll loop: without the cost of a task."""
        if self._polling is not None and not self._polling.done():
            await asyncio.shield(self._polling)
            return
        polled = self._polling = asyncio.get_running_loop().create_future()
        try:
            await self._poll_once()
        finally:
            if not polled.done():
                polled.set_result(None)

    async def refresh(self) -> None:
        """Polls, models included, starting after this call: sees earlier changes whose event has not arrived."""
        if self._polling is not None and not self._polling.done():
            await asyncio.shield(self._polling)
        self._model_polls_due = max(self._model_polls_due, 1)
        await self.poll()

    def configure(self, settings: PollSettings) -> None:
        """Sets the settings for polls that start from now on."""
        sooner = settings.interval_secs < self._settings.interval_secs
        self._settings = settings
        if sooner:  # the current pause may be a long one; the delay spreads the neurons out again
            delay = settings.interval_secs * random.random()  # noqa: S311 - spreads load, hides nothing
            asyncio.get_running_loop().call_later(delay, self.poll_soon)

    def stop_updating(self) -> None:
        """Stops updating the fleet: another poller takes over, or the neuron left the configuration."""
        self._stopped = True

    async def finished(self) -> None:
        """Waits for a poll in progress, if any."""
        if self._polling is not None:
            await asyncio.wait([self._polling])

    async def close(self) -> None:
        """Cancels a poll in progress, if any."""
        if isinstance(self._polling, asyncio.Task):
            await cancel_all([self._polling])

    def poll_soon(self) -> None:
        """Makes the poll loop poll now instead of after its pause."""
        self._wake.set()

    async def _poll_once(self) -> None:
        began = self._clock()
        try:
            async with timeout(self._settings.timeout_secs):
                await self._request_state()
        except asyncio.TimeoutError:
            self._miss(f"no answer within {self._settings.timeout_secs:g} s")
        except (NeuronUnreachable, NeuronRefused) as error:
            hint = _TLS_HINT if error.reason == CLOSED and not self._discovery_known else ""
            self._miss(error.reason + hint)
        else:
            self.counts.answered += 1
            self.counts.answer_secs += self._clock() - began
            return
        self.counts.failed += 1
        self._model_polls_due = max(self._model_polls_due, 1)  # it may have been due in the poll that failed

    def _miss(self, reason: str) -> None:
        """Ignores misses of extra polls (an event stream ended, an engine was not found) right after another miss, so
        that a restarting neuron gets the full `unhealthy_after` intervals."""
        if self._stopped:
            return
        now = self._clock()
        if now - self._missed_at >= _MISS_SPACING * self._settings.interval_secs:
            self._missed_at = now
            self._fleet.record_miss(self.name, reason)

    async def _request_state(self) -> None:
        """Requests health, models unless events report them, and discovery once per process, after recovery, and when
        a device is lost or comes back."""
        started = self._clock()
        if self._stopped:
            return
        node = self._fleet.node(self.name)
        health = await self._client.health()
        devices = frozenset(device.index for device in health.devices)
        known = self._discovery_known and (health.instance_id, devices) == (self._instance, self._devices)
        changed = not known or not node.healthy
        models: Sequence[ModelView] | None = None
        if self._models_due(health) or changed:
            self._polls_without_models = 0
            models = await self._client.models()
        discovery: Discovery | None = None
        if changed:
            discovery = await self._client.discovery()
            self._instance, self._devices = discovery.instance_id or health.instance_id, devices
        if self._stopped:
            return
        self._discovery_known = True
        self._fleet.record_poll(
            self.name,
            started=started,
            health=health,
            models=models,
            discovery=discovery,
            ignored_fields=self._client.answers.ignored_fields,
        )

    def _models_due(self, health: NeuronHealth) -> bool:
        """Also true if health lists different engines than before: an event may have been lost."""
        active = frozenset((entry.id, instance_of(entry)) for entry in health.models)
        due = (
            not self._listening
            or self._model_polls_due > 0
            or self._polls_without_models + 1 >= FULL_EVERY
            or active != self._active
        )
        self._active = active
        self._polls_without_models += 1
        self._model_polls_due = max(self._model_polls_due - 1, 0)
        return due

    async def listen_loop(self) -> None:
        """Listens to `/events` while the neuron is healthy and has them."""
        while True:
            await self._fleet.until(self.name, lambda node: node.healthy)
            instance = self._instance
            try:
                await self._client.listen(self._apply)
            except NeuronRefused:
                with contextlib.suppress(asyncio.TimeoutError):
                    async with timeout(NO_EVENTS_RETRY_SECS):
                        await self._fleet.until(self.name, lambda _: self._instance != instance)  # noqa: B023 - in this round
            except NeuronUnreachable as error:
                log.debug("%s", error)
            finally:
                self._listening = False
            self.poll_soon()
            await asyncio.sleep(EVENTS_RETRY_SECS * random.uniform(1.0, 1.5))  # noqa: S311 - spreads load, hides nothing

    def _model(self, data: Any) -> ModelView:
        """A model in an event. Raises ValidationError."""
        return self._client.answers.read("/models", ModelView, data, partial=True)

    def _apply(self, name: str, data: Any) -> None:
        if self._stopped:
            return
        try:
            if name == "snapshot":
                for item in data if isinstance(data, list) else data["models"]:
                    self._fleet.update_model(self.name, self._model(item))
                self._listening = True
                self._model_polls_due = 1  # the snapshot does not name removed models
            elif name == "model":
                view = self._model(data)
                known = self._fleet.node(self.name).view(view.id, instance_of(view))
                self._fleet.update_model(self.name, view)
                if known is None or known.status != view.status:
                    self._model_polls_due = MEASURED_POLLS
                    self.poll_soon()  # VRAM has changed with it
            elif name == "device":
                self.poll_soon()  # what can be placed there has changed
            elif name == "removed":
                self._fleet.remove_model(self.name, str(data["id"]), data.get("instance"))
        except (ValidationError, LookupError, TypeError) as error:
            log.warning("neuron %s sent an invalid event: %s", self.name, error)
