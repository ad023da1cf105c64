"""The control's side of its workers: starts them, answers them, replaces those that die, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from cortex.config.live import LiveConfig
from cortex.control.resolver import Resolver
from cortex.control.route_table import RouteTable
from cortex.control.shutdown import Shutdown
from cortex.fleet.state import Fleet
from cortex.metrics.counters import Counters
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.replica import Failure, Replica, ReplicaKey
from cortex.upstream.address import Address
from cortex.workers.channel import Channel
from cortex.workers.messages import (
    AskEngine,
    AskEngineEnd,
    CancelResolve,
    CatalogueChanged,
    Collect,
    ConfigChanged,
    Counted,
    DownChanged,
    EngineEnd,
    EngineFound,
    EngineRetired,
    FromWorker,
    InFlightNow,
    Notes,
    OthersInFlight,
    Ready,
    Released,
    Resolve,
    Resolved,
    ResponseMade,
    RouteUnused,
    Setup,
    Stop,
    TableChanged,
    counts_from_wire,
    counts_to_wire,
    error_to_wire,
)
from shared.errors import ServiceError
from shared.request_ids import request_scope
from shared.tasks import TaskSet, cancel_all, first_of, timeout

log = logging.getLogger(__name__)

COLLECT_TIMEOUT_SECS = 1.0
STOP_MARGIN_SECS = 5.0
"""Time for a worker to exit beyond its drain timeout."""
NOTES_SECS = 1.0
"""Between two reports on the models that a worker waits for."""
EARLY_DEATH_SECS = 5.0
"""A worker that exits sooner is replaced only after a pause."""
MAX_PAUSE_SECS = 30.0


class WorkerProcess:
    """One worker process and its channel. Implements `metrics.worker_counts.WorkerCounts` with its last report."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: Channel[FromWorker],
        ready: asyncio.Event,
        *,
        live: LiveConfig,
        resolver: Resolver,
        counts: CountTotals,
    ) -> None:
        """Sets `ready` once the worker serves."""
        self.process = process
        self._ready = ready
        self._live = live
        self._resolver = resolver
        self._counts = counts
        self._channel = channel
        self._counters = Counters()
        self._in_flight: Mapping[ReplicaKey, int] = {}
        # Routes sent since the last report, which does not have them yet.
        self._granted: Counter[ReplicaKey] = Counter()
        self._taken: dict[ReplicaKey, list[Replica]] = {}  # requests at replicas with a limit
        self._begun: dict[ReplicaKey, int] = {}
        self._resolving: dict[int, asyncio.Task[None]] = {}
        self._resolving_models: dict[int, str] = {}  # by the same numbers
        self._noting: asyncio.TimerHandle | None = None
        self._collecting: dict[int, asyncio.Future[None]] = {}
        self._tasks = TaskSet()
        self._numbers = 0

    def collect(self) -> Counters:
        return self._counters

    def in_flight_here(self) -> Mapping[ReplicaKey, int]:
        return Counter(self._in_flight) + self._granted if self._granted else self._in_flight

    def begun_here(self) -> Mapping[ReplicaKey, int]:
        return self._begun

    async def refresh(self) -> None:
        """Asks for the latest counts. Without an answer in time the last ones stay."""
        self._numbers += 1
        number, future = self._numbers, asyncio.get_running_loop().create_future()
        self._collecting[number] = future
        self._channel.send(Collect(number))
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(COLLECT_TIMEOUT_SECS):
                    await future
        finally:
            del self._collecting[number]

    def send(self, message: Any) -> None:
        self._channel.send(message)

    async def listen(self) -> None:
        """Handles the worker's messages until it is gone."""
        try:
            async for message in self._channel.messages():
                match message:
                    case Resolve(number, model_id, failures, request_id):
                        self._resolve(number, model_id, failures, request_id)
                    case CancelResolve(number):
                        self._cancel_resolve(number)
                    case AskEngine() | AskEngineEnd():
                        _task = self._tasks.spawn(self._tell_of_engine(message), name="worker's question")
                    case Released(replica):
                        self._release(replica)
                    case RouteUnused(replica):
                        self._take_back(replica)
                    case InFlightNow(counts, begun):
                        self._reported(counts)
                        self._begun.update(counts_from_wire(begun))
                        self._update_others()
                    case ResponseMade(response_id, replica):
                        self._resolver.tell_owner(response_id, replica)
                        for other in self._others():
                            other.send(message)
                    case Counted(number, counters, counts):
                        self._counters = counters
                        self._reported(counts)
                        _answered(self._collecting.get(number))
                    case Ready():
                        self._ready.set()
        finally:
            await self._end()

    async def _end(self) -> None:
        """The worker is gone."""
        self._reported([])
        for waiting in self._collecting.values():
            _answered(waiting)  # no further report will come
        if self._noting is not None:
            self._noting.cancel()
        await self._tasks.close()
        for taken in self._taken.values():
            self._resolver.release(taken[0], len(taken))
        await self._channel.close()

    def _resolve(self, number: int, model_id: str, failures: list[Failure], request_id: str | None) -> None:
        with request_scope(request_id):
            task = self._tasks.spawn(self._answer(number, model_id, failures), name=f"resolve {model_id}")
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

    async def _answer(self, number: int, model_id: str, failures: list[Failure]) -> None:
        try:
            route = await self._resolver.resolve(model_id, failures)
        except ServiceError as error:
            self._channel.send(error_to_wire(number, error))
        else:
            replica = route.replica
            self._granted[replica.model_id, replica.node] += 1
            if replica.limit is not None:
                self._taken.setdefault((replica.model_id, replica.node), []).append(replica)
            self._channel.send(Resolved(number, route))

    def _release(self, replica: Replica) -> None:
        taken = self._taken[replica.model_id, replica.node]
        taken.pop()
        if not taken:
            del self._taken[replica.model_id, replica.node]
        self._resolver.release(replica)

    def _take_back(self, replica: Replica) -> None:
        """Counts a route no more for which the worker has no request."""
        self._granted -= Counter({(replica.model_id, replica.node): 1})
        if replica.limit is not None:
            self._release(replica)

    async def _tell_of_engine(self, asked: AskEngine | AskEngineEnd) -> None:
        if isinstance(asked, AskEngine):
            engine = await self._resolver.engine(asked.model_id, asked.node)
            self._channel.send(EngineFound(asked.number, engine))
        else:
            self._channel.send(EngineEnd(asked.number, await self._resolver.engine_end(asked.replica)))

    def _reported(self, counts: list[tuple[str, str, int]]) -> None:
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


class Supervisor:
    """Keeps one worker running for each listening socket. The sockets stay open here: connections that arrive while a
    worker is replaced wait instead of being refused."""

    def __init__(
        self,
        socks: Sequence[socket.socket],
        address: Address,
        *,
        live: LiveConfig,
        resolver: Resolver,
        routes: RouteTable,
        counts: CountTotals,
        fleet: Fleet,
        shutdown: Shutdown,
    ) -> None:
        """A worker for each of `socks`; `address` is the control app's."""
        self._socks = socks
        self._address = address
        self._live = live
        self._resolver = resolver
        self._routes = routes
        self._counts = counts
        self._fleet = fleet
        self._shutdown = shutdown
        self._workers: dict[int, WorkerProcess] = {}
        self._ready = [asyncio.Event() for _ in socks]
        self._stopping = False

    @contextlib.asynccontextmanager
    async def running(self, stop: asyncio.Event) -> AsyncIterator[None]:
        """The workers serve inside the body; on exit they finish their requests in flight. `stop` ends the wait for
        workers that do not start."""
        subscriptions = [
            self._routes.changes.subscribe(self._table_changed),
            self._routes.retired.subscribe(self._engine_retired),
            self._live.changes.subscribe(self._configuration_changed),
            self._fleet.down_changes.subscribe(self._down_changed),
        ]
        keepers = [
            asyncio.create_task(self._keep_running(number), name=f"worker {number}")
            for number in range(len(self._socks))
        ]
        try:
            await first_of({"ready": self._all_ready(), "stop": stop.wait()})
            yield
        finally:
            self._stopping = True
            for sock in self._socks:
                sock.close()
            for worker in self._workers.values():
                worker.send(Stop())
            await self._counts.refresh()  # they know of it before requests are refused
            self._shutdown.begin()
            timeout_secs = self._live.config.gateway.drain_timeout_secs + STOP_MARGIN_SECS
            await asyncio.wait(keepers, timeout=timeout_secs)
            self.kill()
            await cancel_all(keepers)
            for unsubscribe in subscriptions:
                unsubscribe()

    async def _all_ready(self) -> None:
        for ready in self._ready:
            await ready.wait()

    def kill(self) -> None:
        """Kills the workers."""
        for worker in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGKILL)

    def _table_changed(self, model_id: str, replicas: tuple[Replica, ...]) -> None:
        for worker in self._workers.values():
            worker.send(TableChanged(model_id, replicas))

    def _engine_retired(self, url: str) -> None:
        for worker in self._workers.values():
            worker.send(EngineRetired(url))

    def _configuration_changed(self) -> None:
        models, aliases = self._catalogue()
        config = self._live.config.model_dump_json()
        for worker in self._workers.values():
            worker.send(CatalogueChanged(models, aliases))
            worker.send(ConfigChanged(config))

    def _down_changed(self) -> None:
        for worker in self._workers.values():
            worker.send(DownChanged(list(self._fleet.down)))

    def _catalogue(self) -> tuple[list[str], dict[str, str]]:
        catalogue = self._live.catalogue
        return [profile.id for profile in catalogue.models], dict(catalogue.aliases)

    async def _keep_running(self, number: int) -> None:
        pause = 0.0
        while not self._stopping:
            started = time.monotonic()
            status = await self._run(number)
            if self._stopping:
                return
            early = time.monotonic() - started < EARLY_DEATH_SECS
            pause = min(max(2 * pause, 1.0), MAX_PAUSE_SECS) if early else 0.0
            log.error("worker %d exited with status %d; restarting in %g s", number, status, pause)
            await asyncio.sleep(pause)

    async def _run(self, number: int) -> int:
        """Runs one process until it exits. Returns its exit status."""
        ours, theirs = socket.socketpair()
        listening = self._socks[number].fileno()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "cortex.workers", str(theirs.fileno()), str(listening)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), listening),
                start_new_session=True,  # Ctrl-C goes to the control, which lets its workers finish
            )
        channel: Channel[FromWorker] = await Channel.over(ours, msgspec.msgpack.Decoder(FromWorker))
        worker = WorkerProcess(
            process, channel, self._ready[number], live=self._live, resolver=self._resolver, counts=self._counts
        )
        worker.send(self._setup())
        self._workers[number] = worker
        if self._stopping:  # began while the process was started
            worker.send(Stop())
        self._counts.attach(worker)
        log.info("worker %d is process %d", number, process.pid)
        listen = asyncio.create_task(worker.listen(), name=f"worker {number} channel")
        try:
            status = await process.wait()
            await listen  # to its final report
        finally:
            if process.returncode is None:
                process.kill()
            await cancel_all([listen])
            del self._workers[number]
            self._counts.detach(worker)
        return status

    def _setup(self) -> Setup:
        models, aliases = self._catalogue()
        return Setup(
            config=self._live.config.model_dump_json(),
            models=models,
            aliases=aliases,
            table=dict(self._resolver.table),
            control_host=self._address.host,
            down=list(self._fleet.down),
            responses=self._resolver.response_owners.listed(),
        )
