"""One worker process, as the control sees it: answers its questions and keeps its last report."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from cortex.accounts.sign_in.person import People
from cortex.config.live import LiveConfig
from cortex.control.resolver import Resolver
from cortex.metrics.counters import CallerSeries, Counters
from cortex.metrics.in_flight import CallerAt, CallerCount
from cortex.metrics.requests.entries import SeenRequests
from cortex.metrics.requests.filter import RequestFilter
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.replica import Replica, ReplicaKey
from cortex.workers.channel import Channel
from cortex.workers.messages import (
    Admit,
    AskEngine,
    AskEngineEnd,
    AskMaker,
    AskPerson,
    AskProspect,
    AskRequests,
    CancelResolve,
    Collect,
    Counted,
    Counts,
    FromWorker,
    InFlightNow,
    Notes,
    OthersInFlight,
    Ready,
    Released,
    RequestsSeen,
    Resolve,
    Resolved,
    ResponseMade,
    RouteUnused,
    Settle,
    counts_from_wire,
    counts_to_wire,
    error_to_wire,
)
from cortex.workers.worker_grants import WorkerGrants
from cortex.workers.worker_questions import WorkerQuestions
from shared.errors import ServiceError
from shared.request_ids import request_scope
from shared.tasks import TaskSet, timeout

COLLECT_TIMEOUT_SECS = 1.0
NOTES_SECS = 1.0
"""Between two reports on the models that a worker waits for."""


class WorkerProcess:
    """One worker process and its channel. Implements `metrics.worker_counts.WorkerCounts` with its last report, and
    `metrics.requests.history.RequestSource`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: Channel[FromWorker],
        ready: asyncio.Event,
        *,
        live: LiveConfig,
        resolver: Resolver,
        counts: CountTotals,
        people: People | None = None,
    ) -> None:
        """Sets `ready` once the worker serves. `people`: knows those that sign in; None without `[auth.oidc]`."""
        self.process = process
        self._ready = ready
        self._live = live
        self._resolver = resolver
        self._counts = counts
        self._channel = channel
        self._counters = Counters()  # without those by API key
        self._by_key: dict[str, dict[str, CallerSeries]] = {}  # of the last report that had them
        self._in_flight: Mapping[ReplicaKey, int] = {}
        # Routes sent since the last report, which does not have them yet.
        self._granted: Counter[ReplicaKey] = Counter()
        self._taken: dict[ReplicaKey, list[Replica]] = {}  # requests at replicas with a limit
        self._begun: dict[ReplicaKey, int] = {}
        self._callers: dict[CallerAt, int] = {}  # requests in flight, by API key
        self._callers_begun: Counter[CallerAt] = Counter()  # since they were last taken
        self._resolving: dict[int, asyncio.Task[None]] = {}
        self._resolving_models: dict[int, str] = {}  # by the same numbers
        self._noting: asyncio.TimerHandle | None = None
        self._collecting: dict[int, asyncio.Future[None]] = {}
        self._looking: dict[int, asyncio.Future[SeenRequests]] = {}
        self._tasks = TaskSet()
        self._grants = WorkerGrants(resolver.limiter, channel.send, self._tasks)
        self._questions = WorkerQuestions(resolver, people, channel.send, self._tasks)
        self._numbers = 0

    def collect(self, *, callers: bool = False) -> Counters:
        return msgspec.structs.replace(self._counters, callers=self._by_key) if callers else self._counters

    def in_flight_here(self) -> Mapping[ReplicaKey, int]:
        return Counter(self._in_flight) + self._granted if self._granted else self._in_flight

    def begun_here(self) -> Mapping[ReplicaKey, int]:
        return self._begun

    def take_callers(self) -> Mapping[CallerAt, CallerCount]:
        now, begun = self._callers, self._callers_begun
        self._callers_begun = Counter()
        return {at: CallerCount(now.get(at, 0), begun[at]) for at in now.keys() | begun.keys()}

    async def refresh(self, *, callers: bool = False) -> None:
        """Asks for the latest counts. Without an answer in time the last ones stay."""
        self._numbers += 1
        number, future = self._numbers, asyncio.get_running_loop().create_future()
        self._collecting[number] = future
        self._channel.send(Collect(number, callers))
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(COLLECT_TIMEOUT_SECS):
                    await future
        finally:
            del self._collecting[number]

    async def requests_since(self, place: int, asked: RequestFilter, limit: int) -> SeenRequests:
        self._numbers += 1
        number = self._numbers
        future: asyncio.Future[SeenRequests] = asyncio.get_running_loop().create_future()
        self._looking[number] = future
        self._channel.send(AskRequests(number, place, asked, limit))
        try:
            async with timeout(COLLECT_TIMEOUT_SECS):
                return await future
        except asyncio.TimeoutError:
            return SeenRequests(place, [], [], 0)
        finally:
            del self._looking[number]

    def send(self, message: Any) -> None:
        self._channel.send(message)

    async def listen(self) -> None:
        """Handles the worker's messages until it is gone."""
        try:
            async for message in self._channel.messages():
                match message:
                    case Resolve():
                        self._resolve(message)
                    case CancelResolve(number):
                        self._cancel_resolve(number)
                    case Admit() | Settle():
                        self._grants.receive(message)
                    case AskProspect() | AskEngine() | AskEngineEnd() | AskMaker() | AskPerson():
                        self._questions.receive(message)
                    case Released() | RouteUnused():
                        self._give_back(message)
                    case InFlightNow(counts, begun, callers):
                        self._reported(counts)
                        self._callers = {at: count.now for at, count in callers}
                        self._callers_begun.update({at: count.begun for at, count in callers})
                        self._begun.update(counts_from_wire(begun))
                        self._update_others()
                    case ResponseMade(response_id, maker):
                        self._resolver.tell_owner(response_id, maker)
                        for other in self._others():
                            other.send(message)
                    case Counted() | RequestsSeen():
                        self._told(message)
                    case Ready():
                        self._ready.set()
        finally:
            await self._end()

    def _told(self, answer: Counted | RequestsSeen) -> None:
        if isinstance(answer, Counted):
            if answer.callers:
                self._by_key = answer.counters.callers
            self._counters = msgspec.structs.replace(answer.counters, callers={})
            self._reported(answer.in_flight)
            _answered(self._collecting.get(answer.number))
            return
        looking = self._looking.get(answer.number)
        if looking is not None and not looking.done():
            looking.set_result(answer.seen)

    async def _end(self) -> None:
        """The worker is gone."""
        self._reported([])
        for waiting in self._collecting.values():
            _answered(waiting)  # no further report will come
        for looking in self._looking.values():
            if not looking.done():
                looking.set_result(SeenRequests(0, [], [], 0))
        if self._noting is not None:
            self._noting.cancel()
        await self._tasks.close()
        for taken in self._taken.values():
            self._resolver.release(taken[0], len(taken))
        self._grants.end()
        await self._channel.close()

    def _resolve(self, asked: Resolve) -> None:
        number, model_id = asked.number, asked.model_id
        with request_scope(asked.request_id):
            task = self._tasks.spawn(self._answer(asked), name=f"resolve {model_id}")
        self._resolving[number] = task
        self._resolving_models[number] = model_id
        task.add_done_callback(lambda _: self._resolved(number))
        if self._noting is None:
            self._noting = asyncio.get_running_loop().call_later(self._note_secs, self._note)

    def _cancel_resolve(self, number: int) -> None:
        if number in self._resolving:
            self._resolving[number].cancel()

    @property
    def _note_secs(self) -> float:
        """The first report arrives before the worker's first keep-alive comment."""
        return min(NOTES_SECS, self._live.config.waiting.first_comment_secs / 2)

    def _resolved(self, number: int) -> None:
        del self._resolving[number], self._resolving_models[number]

    def _note(self) -> None:
        """Sends the progress of the models that the worker waits for; repeats while there are any."""
        self._noting = None
        models = set(self._resolving_models.values())
        if models:
            self._channel.send(Notes({model_id: self._resolver.note(model_id) for model_id in models}))
            self._noting = asyncio.get_running_loop().call_later(self._note_secs, self._note)

    async def _answer(self, asked: Resolve) -> None:
        number = asked.number
        try:
            route = await self._resolver.resolve(asked.model_id, asked.failures, asked.caller, asked.tokens)
        except ServiceError as error:
            self._channel.send(error_to_wire(number, error))
        else:
            replica = route.replica
            self._granted[replica.key] += 1
            if replica.limit is not None:
                self._taken.setdefault(replica.key, []).append(replica)
            self._channel.send(Resolved(number, route))

    def _give_back(self, message: Released | RouteUnused) -> None:
        if isinstance(message, Released):
            self._release(message.replica)
        else:
            self._take_back(message.replica)

    def _release(self, replica: Replica) -> None:
        taken = self._taken[replica.key]
        taken.pop()
        if not taken:
            del self._taken[replica.key]
        self._resolver.release(replica)

    def _take_back(self, replica: Replica) -> None:
        """Counts a route no more for which the worker has no request."""
        self._granted -= Counter({replica.key: 1})
        if replica.limit is not None:
            self._release(replica)

    def _reported(self, counts: Counts) -> None:
        self._in_flight = counts_from_wire(counts)
        self._granted.clear()

    def _update_others(self) -> None:
        for other in self._others():
            other.send(OthersInFlight(counts_to_wire(self._counts.in_flight_beside(other))))

    def _others(self) -> list[WorkerProcess]:
        workers = self._counts.workers
        return [worker for worker in workers if isinstance(worker, WorkerProcess) and worker is not self]


def _answered(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
