"""Starts engines and adopts those of an earlier neuron; releases everything they took from the host."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace

import aiohttp

from neuron.config import NeuronConfig
from neuron.engine import records, session, shared_memory
from neuron.engine.engine import Engine, until_released
from neuron.engine.health import HealthMonitor
from neuron.engine.output import EngineOutput
from neuron.engine.ports import PortPool, lingering_ports, local_url
from neuron.engine.process import EngineProcess
from neuron.engine.records import RunRecord
from neuron.engine.session import Leader
from neuron.engine.state_dir import EngineDir, FoundEngine, StateDir
from neuron.errors import LoadFailed, cannot_start
from neuron.gpu.discovery import usable_cores
from neuron.gpu.topology import Topology, TopologySource
from neuron.harness.base import EngineCommand, GroupNetwork, LaunchFacts, LaunchPlan
from neuron.harness.environment import inheritable
from neuron.harness.installed import InstalledEngines
from neuron.harness.registry import harness_of
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.lifecycle.failure_cause import because
from neuron.lifecycle.group_network import GroupListeners
from neuron.lifecycle.spare.spare import Spare, SpareFailed, SpareRefused
from neuron.lifecycle.spare.spares import Spares
from neuron.memory.ledger import EnginePlacement
from neuron.memory.ram import node_ram_mb
from neuron.spec import EngineSpec
from shared.errors import Unavailable
from shared.protocol import FailureCause

log = logging.getLogger(__name__)

_NODE = because(FailureCause.NODE)


@dataclass(frozen=True)
class _Preparation:
    """Of a start: the engine's number, directory, plan and command; and the spare process that is to become it."""

    number: int
    directory: EngineDir
    plan: LaunchPlan
    command: EngineCommand
    spare: Spare | None = None


class Launcher:
    """Single owner of the engines' ports, directories and processes. Registers running engines in `memory`.

    `numbers` are above the number of every engine directory that is still there.
    """

    def __init__(
        self,
        config: NeuronConfig,
        source: TopologySource,
        state: StateDir,
        http: aiohttp.ClientSession,
        memory: EngineMemory,
        *,
        spares: Spares,
        groups: GroupListeners,
        installed: InstalledEngines,
        numbers: Iterator[int],
    ) -> None:
        self._config = config
        self._source = source
        self._state = state
        self._http = http
        self._memory = memory
        self._ports = PortPool(config.host)
        self._spares = spares
        self._groups = groups
        self._installed = installed
        self._numbers = numbers

    @property
    def reserved_ports(self) -> frozenset[int]:
        return self._ports.reserved

    @contextlib.asynccontextmanager
    async def engine(
        self, spec: EngineSpec, placement: EnginePlacement, *, api_key: str | None, use_spare: bool = True
    ) -> AsyncIterator[Engine]:
        """Starts an engine, from a spare process if there is one; it is not ready yet. With `api_key` None it serves
        without a key. After the body it is stopped and only its log remains, unless `engine.leave` is set.

        Raises:
            LoadFailed: its executable cannot be started, or its record cannot be written.
            Unavailable: no port is free, or rank 0 of its group has no address.
        """
        settings = self._config.harness_settings(spec.harness)
        async with contextlib.AsyncExitStack() as cleanup:
            topology = await self._source.discover()
            port = await self._port(settings.port_range)
            cleanup.callback(self._ports.release, port)
            facts = await asyncio.to_thread(self._facts, topology)
            network = None if spec.group is None else await self._groups.network_of(spec.group)
            spare = self._spares.take(spec.harness) if use_spare else None
            if spare is not None:
                cleanup.push_async_callback(spare.close)
            made = await self._prepared(spec, placement, port, facts, api_key=api_key, spare=spare, network=network)
            plan, directory, harness = made.plan, made.directory, harness_of(spec.harness, self._config)
            cleanup.push_async_callback(asyncio.to_thread, directory.remove_tmp)
            record = RunRecord(
                boot_id=records.boot_id(),
                number=made.number,
                engine_id=plan.engine_id,
                spec=records.spec_fields(spec),
                instance=spec.instance,
                variant=spec.variant,
                devices=list(placement.indices),
                booked_mb=list(placement.booked_mb),
                share_mb=placement.share_mb,
                ram_mb=placement.ram_mb,
                cores=list(placement.cores),
                host=plan.host,
                port=port,
                api_key=plan.api_key,
                control_key=plan.control_key or "",
                engine_version=plan.installed.version,
                can_sleep=harness.can_sleep(plan, facts),
                keep_alive_secs=harness.keep_alive_secs(made.command.env),
                tmp_dir=plan.tmp_dir,
                started_at=time.time(),
            )
            # Before the start too: the next neuron kills engines without a record.
            await self._write(directory, record)
            from_spare = await self._from_spare(made)
            process = from_spare or await self._start(made.command, directory)
            engine = self._engine(record, spec, placement, directory, process)
            engine.command, engine.from_spare = made.command, from_spare is not None
            self._memory.add(engine)
            cleanup.push_async_callback(self._stop, engine)
            await self._write(directory, engine.current_record())
            how = "spare process" if engine.from_spare else "engine process"
            log.info("%s: %s %d, port %d, on %s", spec.key, how, process.pid, port, placement.why)
            yield engine
            if engine.leave:
                await self._leave(engine)
                cleanup.pop_all()

    @contextlib.asynccontextmanager
    async def adopted(
        self, record: RunRecord, directory: EngineDir, placement: EnginePlacement
    ) -> AsyncIterator[Engine | None]:
        """The engine of an earlier neuron's record; None when it no longer runs. After the body it is stopped as in
        `engine`."""
        leader = Leader(record.pid or 0, record.start_ticks or 0, record.engine_id)
        async with contextlib.AsyncExitStack() as cleanup:
            cleanup.push_async_callback(asyncio.to_thread, directory.remove_tmp)
            process = EngineProcess.adopt(leader)
            if process is None:
                yield None
                return
            self._ports.claim(record.port)
            cleanup.callback(self._ports.release, record.port)
            engine = self._engine(record, record.engine_spec, placement, directory, process)
            self._memory.add(engine)
            cleanup.push_async_callback(self._stop, engine)
            yield engine
            if engine.leave:
                await self._leave(engine)
                cleanup.pop_all()

    async def remove_leftovers(
        self, found: Sequence[FoundEngine], *, keep: Sequence[EngineDir], alive: Sequence[str]
    ) -> None:
        """Cleans up after an earlier neuron: kills its engines' processes except those of the engines `alive` (by
        engine id), and removes shared memory files and directories, except those in `keep`."""
        await session.kill_strays(self._state.engine_id_prefix, alive)
        # Files that a running engine has mapped are not removed.
        files = [shared_memory.recorded(each.record.shared_files) for each in found if each.record is not None]
        await asyncio.to_thread(shared_memory.remove, frozenset().union(*files))
        await asyncio.to_thread(self._state.clear_except, keep)

    def kill_all_now(self) -> None:
        """Sends SIGKILL to every engine before it returns."""
        for engine in self._memory.engines:
            engine.process.kill_now()

    async def _prepared(
        self,
        spec: EngineSpec,
        placement: EnginePlacement,
        port: int,
        facts: LaunchFacts,
        *,
        api_key: str | None,
        spare: Spare | None,
        network: GroupNetwork | None,
    ) -> _Preparation:
        """Decides what is started: `spare`, with its number and directory, if it fits.

        Raises:
            LoadFailed: the engine's directory cannot be created.
        """
        control_key = secrets.token_urlsafe(32)
        harness, settings = harness_of(spec.harness, self._config), self._config.harness_settings(spec.harness)
        installed = await self._installed.of(harness, settings, facts.environ)
        if api_key is not None and not harness.takes_key:
            api_key = None
            log.warning(
                "%s: harness %s takes no key: its engine serves everyone who reaches its port", spec.key, spec.harness
            )

        def prepared(number: int, directory: EngineDir, spare: Spare | None = None) -> _Preparation:
            plan = LaunchPlan(
                spec=spec,
                settings=settings,
                devices=placement.devices,
                share_mb=placement.share_mb,
                host=self._config.host,
                port=port,
                tmp_dir=directory.tmp,
                api_key=api_key,
                engine_id=f"{self._state.engine_id_prefix}{number}",
                control_key=control_key,
                network=network,
                installed=installed,
                ram_mb=placement.ram_mb,
                cores=placement.cores if len(placement.cores) < len(usable_cores(self._config)) else (),
            )
            command = harness.command(plan, facts)
            env = self._state.home.usable(command.env, model=spec.source, caches=harness.cache_variables)
            return _Preparation(number, directory, plan, replace(command, env=env), spare)

        if spare is not None:
            made = await asyncio.to_thread(prepared, spare.number, spare.directory, spare)
            mismatch = spare.origin.mismatch(made.command, placement.devices)
            if mismatch is None:
                return made
            log.info("%s: started without the spare process: %s", spec.key, mismatch)
            await spare.close()
            await asyncio.to_thread(spare.directory.remove)
        number = next(self._numbers)
        return await asyncio.to_thread(prepared, number, await self._directory(number))

    async def _from_spare(self, made: _Preparation) -> EngineProcess | None:
        """The engine's process, made from the spare one; None when there is none, or it does not work."""
        if made.spare is None:
            return None
        try:
            await made.spare.become(made.command)
        except SpareFailed as error:
            spec = made.plan.spec
            if isinstance(error, SpareRefused):
                log.info("%s: started without the spare process: %s", spec.key, error)
            else:
                self._spares.failed(spec.harness, str(error))
            await made.spare.close()
            await asyncio.to_thread(made.directory.log.unlink, missing_ok=True)
            return None
        return made.spare.process

    def _engine(
        self,
        record: RunRecord,
        spec: EngineSpec,
        placement: EnginePlacement,
        directory: EngineDir,
        process: EngineProcess,
    ) -> Engine:
        settings = self._config.harness_settings(spec.harness)
        harness = harness_of(spec.harness, self._config)
        url = local_url(record.host, record.port)
        return Engine(
            spec=spec,
            placement=placement,
            harness=harness,
            health=HealthMonitor(
                self._http,
                url,
                health_path=harness.health_path,
                probe=harness.activity,
                settings=self._config.health,
                serves=spec.serves,
                api_key=record.api_key,
            ),
            record=record,
            url=url,
            can_sleep=record.can_sleep,
            slept_mb=record.slept_mb,
            takes_adapters=record.takes_adapters,
            directory=directory,
            process=process,
            output=EngineOutput(directory.log),
            startup_timeout_secs=settings.startup_timeout_secs,
            stall_timeout_secs=settings.stall_timeout_secs,
            stop_timeout_secs=settings.stop_timeout_secs,
            ready_at=record.ready_at,
            load_secs=record.load_secs,
            shared_files=shared_memory.recorded(record.shared_files),
        )

    async def _port(self, port_range: tuple[int, int]) -> int:
        """Raises Unavailable: no port is free."""
        try:
            return self._ports.reserve(port_range)
        except Unavailable:
            # The engine that is being replaced may have used the last port.
            return self._ports.reserve(port_range, lingering=await asyncio.to_thread(lingering_ports))

    async def _directory(self, number: int) -> EngineDir:
        try:
            return await asyncio.to_thread(self._state.new_engine, number)
        except OSError as error:
            raise LoadFailed(
                f"cannot create the engine's directory below {self._state.path}: {error}", extra=_NODE
            ) from error

    async def _write(self, directory: EngineDir, record: RunRecord) -> None:
        try:
            await asyncio.to_thread(records.write, directory.record, record)
        except OSError as error:
            await asyncio.to_thread(directory.remove)
            raise LoadFailed(
                f"cannot write the run record {directory.record}: {error.strerror or error} (without it a restarted "
                "neuron could not find the engine)",
                extra=_NODE,
            ) from error

    async def _start(self, command: EngineCommand, directory: EngineDir) -> EngineProcess:
        try:
            return await EngineProcess.start(command.argv, command.env, directory.log)
        except (OSError, ValueError) as error:
            await asyncio.to_thread(directory.remove)
            # A missing or unusable executable stays so until someone changes the host; a lack of memory does not.
            lasting = isinstance(error, ValueError) or error.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC)
            extra = because(FailureCause.NODE, permanent=lasting)
            raise LoadFailed(cannot_start(command.argv[0], error), extra=extra) from error

    async def _stop(self, engine: Engine) -> None:
        process = engine.process
        try:
            if not process.main_exited.is_set():
                await engine.record_shared_files()
                await engine.record_stop()
            if engine.kill:
                await process.kill()
            else:
                await process.stop(engine.stop_timeout_secs, signal.Signals[engine.harness.stop_signal])
        finally:
            self._memory.remove(engine)
        await self._memory.save_history()
        await engine.output.close()
        await asyncio.to_thread(shared_memory.remove, engine.shared_files)
        engine.vram_released = await until_released(self._source, process.pids_seen)
        if not engine.vram_released:
            log.error("%s: its processes ended, but the driver still counts their memory", engine.spec.key)

    async def _leave(self, engine: Engine) -> None:
        self._state.keep = True
        await engine.save_record()
        await engine.process.detach()
        await engine.output.close()
        self._memory.remove(engine)
        await self._memory.save_history()
        log.info("%s: engine process %d is left running", engine.spec.key, engine.process.pid)

    def _facts(self, topology: Topology) -> LaunchFacts:
        """Blocks for a moment."""
        hidden = frozenset({self._config.token_env} if self._config.token_env else ())
        cpus = usable_cores(self._config)
        node_mb = None
        with contextlib.suppress(OSError, KeyError, ValueError):
            node_mb = node_ram_mb(cpus[0])
        return LaunchFacts(
            has_gpu=topology.has_gpu,
            cpus=cpus,
            ram_total_mb=None if topology.ram is None else topology.ram.vram_total_mb,
            node_ram_mb=node_mb,
            environ=inheritable(os.environ, secrets=hidden),
            vram_dir=self._state.vram,
            device_variable=topology.device_variable,
        )
