"""The control's side of its workers: starts them, replaces those that die, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from cortex.accounts.keys.key_ring import KeyRing
from cortex.accounts.prices import price_list
from cortex.accounts.sign_in.person import People
from cortex.config.aliases import Rewrite
from cortex.config.live import LiveConfig
from cortex.control.resolver import Resolver
from cortex.control.route_table import RouteTable
from cortex.control.shutdown import Shutdown
from cortex.fleet.state import Fleet
from cortex.metrics.requests.history import RequestHistory
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.replica import Replica
from cortex.upstream.address import Address
from cortex.workers.channel import Channel
from cortex.workers.messages import (
    CatalogueChanged,
    ConfigChanged,
    DownChanged,
    EngineRetired,
    FromWorker,
    KeysChanged,
    Setup,
    Stop,
    TableChanged,
)
from cortex.workers.worker_process import WorkerProcess
from shared.tasks import cancel_all, first_of

log = logging.getLogger(__name__)

STOP_MARGIN_SECS = 5.0
"""Time for a worker to exit beyond its drain timeout."""
EARLY_DEATH_SECS = 5.0
"""A worker that exits sooner is replaced only after a pause."""
MAX_PAUSE_SECS = 30.0


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
        keys: KeyRing,
        people: People | None,
        usage_directory: Path | None,
        requests: RequestHistory,
        broker: str | None = None,
    ) -> None:
        """A worker for each of `socks`; `address` is the control app's, `broker` as for `EnginePool`."""
        self._socks = socks
        self._address = address
        self._live = live
        self._resolver = resolver
        self._routes = routes
        self._counts = counts
        self._fleet = fleet
        self._shutdown = shutdown
        self._keys = keys
        self._people = people
        self._usage_directory = usage_directory
        self._broker = broker
        self._requests = requests
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
            self._keys.changes.subscribe(self._keys_changed),
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
        limited = list(self._resolver.limiter.limited_models)
        prices = price_list(self._live)
        config = self._live.config.model_dump_json()
        for worker in self._workers.values():
            worker.send(CatalogueChanged(models, aliases, limited, prices))
            worker.send(ConfigChanged(config))

    def _down_changed(self) -> None:
        for worker in self._workers.values():
            worker.send(DownChanged(list(self._fleet.down)))

    def _keys_changed(self) -> None:
        for worker in self._workers.values():
            worker.send(KeysChanged(self._keys.table))

    def _catalogue(self) -> tuple[list[str], dict[str, Rewrite]]:
        catalogue = self._live.catalogue
        names = list({name: None for profile in catalogue.models for name in catalogue.names_of(profile.id)})
        return names, dict(catalogue.rewrites)

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
            process,
            channel,
            self._ready[number],
            live=self._live,
            resolver=self._resolver,
            counts=self._counts,
            people=self._people,
        )
        worker.send(self._setup())
        self._workers[number] = worker
        if self._stopping:  # began while the process was started
            worker.send(Stop())
        self._counts.attach(worker)
        self._requests.attach(worker)
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
            self._requests.detach(worker)
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
            limited_models=list(self._resolver.limiter.limited_models),
            keys=self._keys.table,
            prices=price_list(self._live),
            usage_directory=None if self._usage_directory is None else str(self._usage_directory),
            broker=self._broker,
        )
