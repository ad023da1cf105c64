"""Everything an engine needs from its host, taken in order and given back in reverse, whatever happens between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from neuron.config import NeuronConfig
from neuron.devices import check_devices
from neuron.engine import Engine, measure, until_released
from neuron.failures import LoadFailed
from neuron.harness import HARNESSES, EngineCommand, HostFacts, LaunchPlan
from neuron.harness.environment import inheritable
from neuron.ledger import Ledger
from neuron.ports import PortPool
from neuron.process import EngineProcess
from neuron.spec import EngineSpec
from neuron.state_dir import EngineDir, StateDir
from neuron.topology import Topology, TopologySource
from shared.errors import InvalidRequest, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launcher:
    """Starts engines on this host."""

    config: NeuronConfig
    instance_id: str
    source: TopologySource
    state: StateDir
    http: aiohttp.ClientSession
    ports: PortPool
    ledger: Ledger = field(default_factory=Ledger)
    running: set[EngineProcess] = field(default_factory=set)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def check(self, spec: EngineSpec) -> None:
        """Refuses what this host cannot serve, before anything is started.

        Raises:
            InvalidRequest: a device that is not there, or a path that is outside of `model_roots`.
            Unavailable: the engine needs a GPU, there is an NVIDIA driver, and it cannot be used.
        """
        topology = await self.source.discover()
        if HARNESSES[spec.harness].runs_on_gpu and topology.cuda_unavailable_reason and not topology.devices:
            reason = f"this host's GPUs cannot be used: {topology.cuda_unavailable_reason}"
            raise Unavailable(reason, code="cuda_unavailable", retry_after=60)
        check_devices(spec, topology)
        roots = self.config.model_roots
        if roots and not await asyncio.to_thread(_is_below, spec.source, roots):
            listed = ", ".join(map(str, roots))
            raise InvalidRequest(f"source: {spec.source!r} is outside of model_roots ({listed})", param="source")

    @contextlib.asynccontextmanager
    async def engine(self, spec: EngineSpec) -> AsyncIterator[Engine]:
        """An engine that was started, not yet ready. After the body nothing of it is left but its log.

        Raises:
            InsufficientVram: its memory is not to be had.
            LoadFailed: its executable cannot be started.
            Unavailable: no port is free.
        """
        settings = self.config.harness_settings(spec.harness)
        harness = HARNESSES[spec.harness]
        number = next(self._numbers)
        async with contextlib.AsyncExitStack() as cleanup:
            topology = await self.source.discover()
            choice = self.ledger.book(
                number, spec, spec.share_mb, topology, await self.source.health(), extra_args=settings.extra_args
            )
            cleanup.callback(self.ledger.release, number)
            devices = choice.devices
            port = self.ports.reserve(settings.port_range)
            cleanup.callback(self.ports.release, port)
            directory = await asyncio.to_thread(self.state.new_engine, number)
            cleanup.push_async_callback(asyncio.to_thread, directory.remove_tmp)
            plan = LaunchPlan(
                spec=spec,
                settings=settings,
                devices=devices,
                share_mb=spec.share_mb,
                host=self.config.host,
                port=port,
                tmp_dir=directory.tmp,
                api_key=secrets.token_urlsafe(32),
                engine_id=f"{self.instance_id}/{number}",
            )
            process = await self._start(harness.command(plan, self._facts(topology)), directory)
            engine = Engine(
                spec=spec,
                harness=harness,
                devices=tuple(device.index for device in devices),
                port=port,
                url=f"http://{_authority(local_address(self.config.host), port)}",
                api_key=plan.api_key,
                directory=directory,
                process=process,
                startup_timeout_secs=settings.startup_timeout_secs,
                stop_timeout_secs=settings.stop_timeout_secs,
            )
            cleanup.push_async_callback(self._end, engine)
            log.info("%s: engine process %d, port %d, on %s", spec.model_id, process.pid, port, choice.why)
            yield engine

    async def measure(self, engines: Collection[Engine]) -> None:
        """Measures the GPU memory of `engines`, all with one question to the driver."""
        await measure(engines, self.source)

    def kill_all_now(self) -> None:
        """SIGKILL to every engine, before the next line of the caller runs."""
        for process in self.running:
            process.kill_now()

    async def _start(self, command: EngineCommand, directory: EngineDir) -> EngineProcess:
        try:
            process = await EngineProcess.start(command.argv, command.env, directory.log)
        except (OSError, ValueError) as error:
            await asyncio.to_thread(directory.remove)
            raise LoadFailed(f"cannot start {command.argv[0]!r}: {error}") from error
        self.running.add(process)
        return process

    async def _end(self, engine: Engine) -> None:
        process = engine.process
        try:
            await process.stop(engine.stop_timeout_secs)
        finally:
            self.running.discard(process)
        engine.vram_released = await until_released(self.source, process.pids_seen)
        if not engine.vram_released:
            log.error("%s: the driver still counts memory of its processes", engine.spec.model_id)

    def _facts(self, topology: Topology) -> HostFacts:
        hidden = frozenset({self.config.token_env} if self.config.token_env else ())
        return HostFacts(
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


def _is_below(source: str, roots: list[Path]) -> bool:
    """True for a path whose real place is in one of `roots`, and for a name that is no path of this host."""
    path = Path(source)
    if not path.is_absolute() and not path.exists():
        return True
    real = path.resolve()
    return any(real.is_relative_to(root.resolve()) for root in roots)
