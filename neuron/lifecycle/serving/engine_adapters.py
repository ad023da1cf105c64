"""Loads and unloads the LoRA adapters of engines while they serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from neuron import errors as failures
from neuron.config import NeuronConfig
from neuron.engine.engine import Engine
from neuron.harness.adapters import CONFIG_FILE, AdapterControl, EngineAccess
from neuron.harness.checks import check_name
from neuron.lifecycle.admission import check_model_roots
from neuron.lifecycle.failure_cause import because
from neuron.lifecycle.instance_state import InstanceState
from neuron.lifecycle.states import State
from shared.errors import InvalidRequest, ServiceError
from shared.protocol import AdapterCommand, FailureCause

log = logging.getLogger(__name__)


class EngineAdapters:
    """Owns which adapters engines have: `Engine.adapters`, which a load request keeps from one engine to the next."""

    def __init__(self, config: NeuronConfig, http: aiohttp.ClientSession) -> None:
        self._config = config
        self._http = http

    async def load(self, model: InstanceState, command: AdapterCommand) -> None:
        """Returns when the loaded engine serves the adapter; at once if it does. If the engine has as many as it can
        have, the first of `command.displaceable` without requests is unloaded.

        Raises:
            InvalidRequest: a value is refused. NotFound: the engine is not loaded. Conflict: it takes no adapters, or
            has no room for another. AdapterFailed: it cannot load it.
        """
        name, source = command.adapter, command.source
        check_name("adapter", name)
        if source is None:
            raise InvalidRequest("source: required, the adapter's directory or its name on a hub", param="source")
        check_name("source", source)
        await check_model_roots(source, self._config.model_roots, param="source")
        engine = _serving(model)
        async with engine.adapter_lock:
            control, access = _control_of(_serving(model, engine))
            present = await control.present(self._http, access)
            if engine.adapters.get(name) == source and name in present:
                return
            await asyncio.to_thread(_check_directory, source)
            if name in engine.adapters or name in present:  # it was unloaded by others, or has another source now
                await self._drop(engine, name)
            await self._make_room(engine, command.displaceable)
            await control.load(self._http, access, name, source)
            engine.adapters[name] = source
            log.info("%s: loaded the adapter %s from %s", model.key, name, source)
            await self._tell(model, engine)

    async def unload(self, model: InstanceState, name: str) -> bool:
        """Returns when the engine accepts no requests for the adapter; those that run continue. False if it had no such
        adapter.

        Raises:
            NotFound: the engine is not loaded. AdapterFailed: it did not answer.
        """
        engine = _serving(model)
        async with engine.adapter_lock:
            if name not in engine.adapters:
                return False
            await self._drop(_serving(model, engine), name)
            log.info("%s: unloaded the adapter %s", model.key, name)
            await self._tell(model, engine)
        return True

    async def restore(self, engine: Engine) -> None:
        """Gives an engine that has just come up the adapters that the one before it had. One that cannot be loaded
        again is left out.

        Raises:
            GuardFailed: the engine would load adapters for others too.
        """
        if engine.spec.max_loras is None or engine.harness.adapters is None or not engine.spec.serves:
            return
        control, access = engine.harness.adapters, _access(engine)
        if not await control.is_guarded(self._http, access):
            log.warning("%s: its engine has no routes to load adapters", engine.spec.key)
            engine.adapters.clear()
            return
        engine.takes_adapters = True
        for name, source in list(engine.adapters.items()):
            try:
                await control.load(self._http, access, name, source)
            except ServiceError as error:
                log.warning("%s: %s", engine.spec.key, error.message)
                del engine.adapters[name]

    async def _make_room(self, engine: Engine, displaceable: Sequence[str]) -> None:
        """Raises Conflict: no adapter may be unloaded."""
        limit = engine.spec.max_loras or 0
        if len(engine.adapters) < limit:
            return
        control, access = _control_of(engine)
        busy = await control.busy(self._http, access)
        idle = [name for name in displaceable if name in engine.adapters and name not in busy]
        missing = len(engine.adapters) - limit + 1
        if len(idle) < missing:
            raise failures.adapters_full(engine.spec.key, limit, list(engine.adapters))
        for name in idle[:missing]:
            log.info("%s: unloads the adapter %s to make room", engine.spec.key, name)
            await self._drop(engine, name)

    async def _drop(self, engine: Engine, name: str) -> None:
        control, access = _control_of(engine)
        await control.unload(self._http, access, name)
        engine.adapters.pop(name, None)

    @staticmethod
    async def _tell(model: InstanceState, engine: Engine) -> None:
        model.publish()
        await engine.save_record()


def _serving(model: InstanceState, expected: Engine | None = None) -> Engine:
    """Its engine, which must be the `expected` one.

    Raises:
        NotFound: it is not loaded, or was loaded again meanwhile.
    """
    engine = model.engine
    if engine is None or model.state is not State.LOADED or expected not in (None, engine):
        raise failures.not_loaded(model.key, model.state.value)
    return engine


def _control_of(engine: Engine) -> tuple[AdapterControl, EngineAccess]:
    """Raises Conflict: it takes no adapters."""
    if engine.harness.adapters is None or not engine.takes_adapters:
        raise failures.adapters_unsupported(engine.spec.key)
    return engine.harness.adapters, _access(engine)


def _access(engine: Engine) -> EngineAccess:
    return EngineAccess(engine.url, engine.api_key, engine.control_key)


def _check_directory(source: str) -> None:
    """Raises AdapterFailed: an absolute path that is not the directory of an adapter here. Blocks."""
    path = Path(source)
    if not path.is_absolute() or (path / CONFIG_FILE).is_file():
        return
    why = f"has no {CONFIG_FILE}" if path.is_dir() else "is not a directory on this host"
    # Another host may have it.
    raise failures.AdapterFailed(f"lora: {source} {why}", extra=because(FailureCause.NODE, permanent=True))
