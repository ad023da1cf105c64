"""Everything an engine needs from its host, taken in order and given back in reverse, whatever happens between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

import aiohttp

from neuron.config import NeuronConfig
from neuron.engine import records
from neuron.engine import shared_memory as litter
from neuron.engine.engine import Engine, measure, until_released
from neuron.engine.health import Vitals
from neuron.engine.output import EngineOutput
from neuron.engine.ports import PortPool, lingering_ports
from neuron.engine.process import EngineProcess
from neuron.engine.records import RunRecord
from neuron.engine.session import Leader
from neuron.engine.state_dir import EngineDir, StateDir
from neuron.errors import LoadFailed
from neuron.gpu.topology import Topology, TopologySource
from neuron.harness.base import EngineCommand, LaunchFacts, LaunchPlan
from neuron.harness.environment import inheritable
from neuron.harness.registry import HARNESSES
from neuron.lifecycle.admission import Admission
from neuron.lifecycle.failure_cause import because
from neuron.lifecycle.start_locks import StartTurns
from neuron.memory.ledger import Ledger
from neuron.memory.placement import EnginePlacement
from neuron.memory.sleep_budget import Sleepers
from neuron.progress.history import LoadHistory
from neuron.spec import EngineSpec
from shared.errors import Unavailable
from shared.protocol import FailureCause

log = logging.getLogger(__name__)

_OF_THE_HOST = because(FailureCause.NODE)


@dataclass(frozen=True)
class Launcher:
    """Starts engines on this host, and takes over those that an earlier neuron started."""

    config: NeuronConfig
    source: TopologySource
    state: StateDir
    http: aiohttp.ClientSession
    ports: PortPool
    history: LoadHistory
    admission: Admission
    turns: StartTurns = field(default_factory=StartTurns)
    sleepers: Sleepers = field(default_factory=Sleepers)
    engines: dict[str, Engine] = field(default_factory=dict)
    """Those that are there, by id, until they are gone or left."""
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def ledger(self) -> Ledger:
        return self.admission.ledger

    async def book_again(self, placement: EnginePlacement, spec: EngineSpec) -> EnginePlacement:
        """For another engine of a run, whose last one is gone. Raises as `Admission.book`; nothing is booked then."""
        await self.measure_all()  # or what others loaded since they were last measured counts as a stranger's
        topology, health = await asyncio.gather(self.source.discover(), self.source.health())
        self.ledger.release(placement.number)
        return self.admission.book(placement.number, spec, placement.share_mb, topology, health)

    @contextlib.asynccontextmanager
    async def engine(self, spec: EngineSpec, placement: EnginePlacement) -> AsyncIterator[Engine]:
        """An engine that was started, not yet ready. After the body nothing of it is left but its log, unless it is to
        be left running.

        Raises:
            LoadFailed: its executable cannot be started, or what is to be known of it cannot be written down.
            Unavailable: no port is free.
        """
        settings = self.config.harness_settings(spec.harness)
        harness = HARNESSES[spec.harness]
        number = next(self.numbers)
        async with contextlib.AsyncExitStack() as cleanup:
            topology = await self.source.discover()
            port = await self._port(settings.port_range)
            cleanup.callback(self.ports.release, port)
            directory = await self._directory(number)
            cleanup.push_async_callback(asyncio.to_thread, directory.remove_tmp)
            plan = LaunchPlan(
                spec=spec,
                settings=settings,
                devices=placement.devices,
                share_mb=placement.share_mb,
                host=self.config.host,
                port=port,
                tmp_dir=directory.tmp,
                api_key=secrets.token_urlsafe(32),
                engine_id=f"{self.state.engine_id_prefix}{number}",
                control_key=secrets.token_urlsafe(32),
            )
            facts = self._facts(topology)
            record = RunRecord(
                boot_id=records.boot_id(),
                number=number,
                engine_id=plan.engine_id,
                spec=records.spec_fields(spec),
                devices=list(placement.indices),
                booked_mb=list(placement.booked_mb),
                share_mb=placement.share_mb,
                host=plan.host,
                port=port,
                api_key=plan.api_key,
                control_key=plan.control_key or "",
                can_sleep=harness.can_sleep(plan, facts),
                tmp_dir=plan.tmp_dir,
                started_at=time.time(),
            )
            # Before the start as well: an engine of which nothing is known would be killed by the next neuron.
            await self._write(directory, record)
            process = await self._start(harness.command(plan, facts), directory)
            engine = self._engine(record, spec, placement, directory, process)
            self.engines[engine.engine_id] = engine
            cleanup.push_async_callback(self._end, engine)
            await self._write(directory, self.record_of(engine))
            log.info("%s: engine process %d, port %d, on %s", spec.model_id, process.pid, port, placement.why)
            yield engine
            if engine.leave:
                await self._leave(engine)
                cleanup.pop_all()

    @contextlib.asynccontextmanager
    async def adopted(
        self, record: RunRecord, directory: EngineDir, placement: EnginePlacement
    ) -> AsyncIterator[Engine | None]:
        """The engine of a record that an earlier neuron wrote, None when it runs no more. It ends as that of `engine`
        does."""
        leader = Leader(record.pid or 0, record.start_ticks or 0, record.engine_id)
        async with contextlib.AsyncExitStack() as cleanup:
            cleanup.push_async_callback(asyncio.to_thread, directory.remove_tmp)
            process = EngineProcess.adopt(leader)
            if process is None:
                yield None
                return
            self.ports.claim(record.port)
            cleanup.callback(self.ports.release, record.port)
            engine = self._engine(record, record.engine_spec, placement, directory, process)
            self.engines[engine.engine_id] = engine
            cleanup.push_async_callback(self._end, engine)
            yield engine
            if engine.leave:
                await self._leave(engine)
                cleanup.pop_all()

    def record_of(self, engine: Engine) -> RunRecord:
        """What a neuron that comes after this one has to know of the engine."""
        leader = engine.process.leader
        return engine.record.model_copy(
            update={
                "pid": leader.pid,
                "start_ticks": leader.start_ticks,
                "can_sleep": engine.can_sleep,
                "ready_at": engine.ready_at,
                "load_secs": engine.load_secs,
                "stopping": engine.stopping,
                "slept_mb": engine.slept_mb,
                "shared_files": sorted((file.path, file.inode) for file in engine.shared_files),
            }
        )

    async def note(self, engine: Engine) -> None:
        """Writes down what has become known of the engine. Without room on the disk the earlier record stands, which is
        enough to find it again."""
        try:
            await asyncio.to_thread(records.write, engine.directory.record, self.record_of(engine))
        except OSError as error:
            log.warning("%s: its run record cannot be written: %s", engine.spec.model_id, error)

    async def note_stopping(self, engine: Engine) -> None:
        """Writes down that it is to end: a neuron that comes after this one must not bring it back."""
        if not engine.kill and not engine.stopping:
            engine.stopping = True
            await self.note(engine)

    async def measure(self, engines: Collection[Engine]) -> None:
        """Measures the GPU memory of `engines`, all with one question to the driver, and lets the ledger know."""
        held = await measure(engines, self.source)
        for engine in engines:
            filling = engine.ready_at is None or engine.waking
            tell = self.ledger.holding if filling else self.ledger.measured
            tell(engine.placement.number, held[engine.placement.number])

    async def measure_all(self) -> None:
        """Measures every engine there is. Before a booking: strangers' use is what is left over."""
        await self.measure(list(self.engines.values()))

    async def held_by(self, engine: Engine) -> dict[int, int]:
        """Measures one engine: MiB by device index. The ledger is not told."""
        return (await measure([engine], self.source))[engine.placement.number]

    def kill_all_now(self) -> None:
        """SIGKILL to every engine, before the next line of the caller runs."""
        for engine in self.engines.values():
            engine.process.kill_now()

    def _engine(
        self,
        record: RunRecord,
        spec: EngineSpec,
        placement: EnginePlacement,
        directory: EngineDir,
        process: EngineProcess,
    ) -> Engine:
        settings = self.config.harness_settings(spec.harness)
        harness = HARNESSES[spec.harness]
        url = f"http://{_authority(local_address(record.host), record.port)}"
        return Engine(
            spec=spec,
            placement=placement,
            harness=harness,
            vitals=Vitals(
                self.http,
                url,
                health_path=harness.health_path,
                probe=harness.activity,
                settings=self.config.health,
            ),
            record=record,
            url=url,
            can_sleep=record.can_sleep,
            slept_mb=record.slept_mb,
            directory=directory,
            process=process,
            output=EngineOutput(directory.log),
            startup_timeout_secs=settings.startup_timeout_secs,
            stop_timeout_secs=settings.stop_timeout_secs,
            ready_at=record.ready_at,
            load_secs=record.load_secs,
            shared_files=litter.recorded(record.shared_files),
        )

    async def _port(self, port_range: tuple[int, int]) -> int:
        """Raises Unavailable: none is free."""
        try:
            return self.ports.reserve(port_range)
        except Unavailable:
            # The engine that is replaced may have had the last one.
            return self.ports.reserve(port_range, lingering=await asyncio.to_thread(lingering_ports))

    async def _directory(self, number: int) -> EngineDir:
        try:
            return await asyncio.to_thread(self.state.new_engine, number)
        except OSError as error:
            raise LoadFailed(
                f"no directory for the engine can be made below {self.state.path}: {error}", extra=_OF_THE_HOST
            ) from error

    async def _write(self, directory: EngineDir, record: RunRecord) -> None:
        try:
            await asyncio.to_thread(records.write, directory.record, record)
        except OSError as error:
            await asyncio.to_thread(directory.remove)
            raise LoadFailed(
                f"the run record {directory.record} cannot be written: {error.strerror or error} (without it a neuron "
                "that comes after this one would not know the engine)",
                extra=_OF_THE_HOST,
            ) from error

    async def _start(self, command: EngineCommand, directory: EngineDir) -> EngineProcess:
        try:
            return await EngineProcess.start(command.argv, command.env, directory.log)
        except (OSError, ValueError) as error:
            await asyncio.to_thread(directory.remove)
            raise LoadFailed(f"cannot start {command.argv[0]!r}: {error}", extra=_OF_THE_HOST) from error

    async def _end(self, engine: Engine) -> None:
        process = engine.process
        try:
            if not process.main_exited.is_set():
                await engine.note_shared_files()
                await self.note_stopping(engine)
            if engine.kill:
                await process.kill()
            else:
                await process.stop(engine.stop_timeout_secs)
        finally:
            self.engines.pop(engine.engine_id, None)
            self.sleepers.gone(engine.placement.number)
        await engine.output.close()
        await asyncio.to_thread(litter.remove, engine.shared_files)
        engine.vram_released = await until_released(self.source, process.pids_seen)
        if not engine.vram_released:
            log.error("%s: the driver still counts memory of its processes", engine.spec.model_id)

    async def _leave(self, engine: Engine) -> None:
        self.state.keep = True
        await self.note(engine)
        await engine.process.leave()
        await engine.output.close()
        self.engines.pop(engine.engine_id, None)
        log.info("%s: engine process %d is left running", engine.spec.model_id, engine.process.pid)

    def _facts(self, topology: Topology) -> LaunchFacts:
        hidden = frozenset({self.config.token_env} if self.config.token_env else ())
        return LaunchFacts(
            has_gpu=topology.has_gpu,
            cpus=tuple(sorted(os.sched_getaffinity(0))),
            environ=inheritable(os.environ, secrets=hidden),
            vram_dir=self.state.vram,
        )


def local_address(host: str) -> str:
    """Where this host itself reaches what is bound to `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read, not bound


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
