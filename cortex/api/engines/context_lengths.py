"""The context length of each model: what its neuron tells, or else its engine in `/v1/models`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from typing import Final, NamedTuple

from aiohttp import web

from cortex.api.engines.engine_questions import EngineQuestions, NoAnswer
from cortex.config.profile import RequestedModel
from cortex.fleet.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot
from cortex.fleet.state import Fleet, RouteChanges
from cortex.fleet.store import StateFile
from cortex.routing.replica import ReplicaKey
from shared.protocol.context_length import length_in
from shared.tasks import TaskSet, running, timeout

log = logging.getLogger(__name__)

ANSWER_SECS: Final = 5.0
"""How long an engine may take to answer."""
LIST_WAIT_SECS: Final = 0.5
"""How long a client's list waits for engines that were not asked before."""
RETRY_SECS: Final = 30.0
"""When to ask an engine again that gave no length."""
MAX_AT_ONCE: Final = 16


class KnownLengths(NamedTuple):
    """Context lengths in tokens. `of_engines`: those of the engines that serve now. `remembered`: by model id or
    `id@variant`, the shortest of its engines when there last were any."""

    of_engines: Mapping[ReplicaKey, int]
    remembered: Mapping[str, int]


NO_LENGTHS: Final = KnownLengths({}, {})


class ContextLengths:
    """Owner of `known`, another object after each change. A length is remembered when the model is unloaded, and over a
    restart of cortex if it has a state directory.

    Where the neuron does not tell the length, the engine is asked: as soon as it has loaded if the neuron tells its
    endpoint; one of a protocol v1 neuron when a client lists the models, because it costs a call to the neuron as well.
    """

    def __init__(
        self,
        fleet: Fleet,
        state: StateFile,
        clients: Mapping[str, NeuronClient],
        broker: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._state = state
        self._clock = clock
        self._asked: dict[ReplicaKey, tuple[object, float]] = {}  # the load that was asked about, when to ask again
        self._seen: FleetSnapshot | None = None
        self._questions = EngineQuestions(clients, broker)
        self._tasks = TaskSet()
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self.known = KnownLengths({}, dict(state.max_model_len))

    async def follow(self) -> None:
        """Asks engines as they load. Never returns."""
        with contextlib.closing(RouteChanges(self._fleet)) as changes:
            self._ask(self._fleet.snapshot().listed_models, told_only=True)
            while True:
                self._ask(await changes.next(), told_only=True)

    async def settle(self) -> None:
        """Asks the engines that were not asked, and gives them a moment to answer."""
        fleet = self._fleet.snapshot()
        if fleet is self._seen:
            return
        self._seen = fleet
        asked = self._ask(fleet.listed_models, told_only=False)
        if asked:
            await asyncio.wait(asked, timeout=LIST_WAIT_SECS)

    async def close(self) -> None:
        await self._tasks.close()
        self._questions.close()

    def _ask(self, models: Iterable[str], *, told_only: bool) -> list[asyncio.Task[None]]:
        fleet, now = self._fleet.snapshot(), self._clock()
        begun: list[asyncio.Task[None]] = []
        looked_at: set[str] = set()
        all_serving: set[ReplicaKey] = set()
        for model_id in models:
            serving = {engine.key for engine in fleet.serving(model_id)}
            looked_at.add(model_id)
            all_serving |= serving
            for engine in fleet.engines(model_id):
                node, view, key = engine
                if key not in serving:
                    self._asked.pop(key, None)
                    continue
                if view.max_model_len is not None:
                    self._note(engine, view.max_model_len)
                    continue
                load, again_at = self._asked.get(key, (None, 0.0))
                if (told_only and view.endpoint is None) or (load == (view.since, node.instance_id) and now < again_at):
                    continue
                self._asked[key] = (view.since, node.instance_id), now + RETRY_SECS
                begun.append(self._tasks.spawn(self._learn(engine), name=f"context length of {model_id}"))
        self._forget({key for key in self.known.of_engines if key.model_id in looked_at} - all_serving)
        return begun

    async def _learn(self, engine: EngineSnapshot) -> None:
        key, model_id = engine.key, engine.key.model_id
        try:
            async with self._slots, timeout(ANSWER_SECS):
                length = length_in(model_id, json.loads(await self._questions.ask(engine, b"/v1/models")))
        except (NoAnswer, ValueError, asyncio.TimeoutError) as error:
            log.debug("context length of %s on %s: %r", model_id, key.name, error)
            return
        except (NeuronRefused, NeuronUnreachable) as error:
            log.debug("context length of %s: %s", model_id, error)
            return
        load, _ = self._asked.get(key, (None, 0.0))
        self._asked[key] = load, float("inf")
        self._note(engine, length)

    def _note(self, engine: EngineSnapshot, length: int) -> None:
        """The engine serves this length."""
        if self.known.of_engines.get(engine.key) != length:
            self._use({**self.known.of_engines, engine.key: length}, {engine.key.model_id})

    def _forget(self, keys: Collection[ReplicaKey]) -> None:
        """These engines serve no more."""
        if keys:
            left = {key: length for key, length in self.known.of_engines.items() if key not in keys}
            self._use(left, {key.model_id for key in keys})

    def _use(self, of_engines: Mapping[ReplicaKey, int], changed: Collection[str]) -> None:
        """Remembers the shortest length of each changed model, and of each of its variants."""
        remembered, fleet = dict(self.known.remembered), self._fleet.snapshot()
        for model_id in changed:
            shortest: dict[str, int] = {}
            for engine in fleet.engines(model_id):
                length, variant = of_engines.get(engine.key), engine.view.variant
                if length is not None:
                    for name in RequestedModel(model_id, variant).names:
                        shortest[name] = min(length, shortest.get(name, length))
            for name, length in shortest.items():
                if remembered.get(name) != length:
                    remembered[name] = length
                    self._state.set_max_model_len(name, length)
        self.known = KnownLengths(of_engines, remembered)


CONTEXT_LENGTHS = web.AppKey("context_lengths", ContextLengths)


async def following(app: web.Application) -> AsyncIterator[None]:
    """Keeps CONTEXT_LENGTHS up to date while the app runs."""
    lengths = app[CONTEXT_LENGTHS]
    async with running({"context lengths": lengths.follow}):
        yield
    await lengths.close()
