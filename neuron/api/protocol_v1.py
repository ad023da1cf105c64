"""Callers that speak only protocol v1: they cannot send engines a key, and count on `GET /models/{id}/endpoint` to load
a model that is not loaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web

from neuron import errors as failures
from neuron.engine.engine import Engine
from neuron.engine.keys import EngineKeys
from neuron.lifecycle.instance_state import InstanceState, NeuronModelView
from neuron.lifecycle.registry import Registry
from neuron.lifecycle.states import State
from neuron.memory.capacity import InsufficientVram
from neuron.spec import InstanceKey
from shared.errors import ServiceError, Unavailable
from shared.protocol import ENGINE_KEYS_HEADER, ErrorCode, LoadCommand, ModelStatus

ROOM_SECS = 60.0
"""How long the endpoint of a model waits for engines to become idle."""
_ROOM_POLL_SECS = 0.25
_ATTEMPTS = 3
_BUSY_SECS = 10.0  # Retry-After
_GONE_SECS = 1.0  # Retry-After
_SCHEME = "huggingface:"
_NOT_RUNNING = frozenset({ModelStatus.UNLOADED.value, ModelStatus.FAILED.value})
_WHOLE = ("utilization_pct", "temp_c")
_COUNTS = ("in_flight", "queue_depth", "ended")
_ENDPOINT_HELPS = 2
_USE = {
    ModelStatus.LOADING.value: 0,  # helexa's cortex loads such a model by its catalogue, and evicts others for it
    ModelStatus.RECOVERING.value: 1,  # it tells its client to retry
    ModelStatus.LOADED.value: 3,
}
"""What such a cortex does with a status, the best last. With any other it asks for the endpoint."""


def carries_keys(request: web.Request) -> bool:
    """True when the caller sends engines their key; False for one that speaks only protocol v1."""
    return ENGINE_KEYS_HEADER in request.headers


def plain_id(model_id: str) -> str:
    """The id without the registry's name: helexa's cortex puts it before the id in a load, and nowhere else."""
    return model_id.removeprefix(_SCHEME)


class ProtocolV1:
    """What these callers get. Single owner of the models that are not listed to them."""

    def __init__(self, registry: Registry, keys: EngineKeys) -> None:
        self._registry = registry
        self._keys = keys
        self._unlisted: set[str] = set()

    async def loads(self, model_id: str) -> None:
        """Such a caller has loaded the model, which is then listed to it."""
        self._unlisted.discard(model_id)
        await self._keys.met_v1_caller(model_id)

    async def until_usable(self, model_id: str, instance: str | None = None) -> InstanceState:
        """The named or any instance of the model, when it is loaded and its engine takes requests without a key, or,
        where every caller has sent neuron's token, with one. Loads the model as it was last loaded; idle engines
        without a key make room for it. An idle engine that has a key and need not have one is replaced.

        If the load fails, the model is not listed to these callers until they load it: their cortex then chooses a host
        for it, and evicts others, by its own rules.

        Raises:
            NotFound: the model was never asked for. ServiceError: the load failed, or the engine's key stays.
        """
        self._best(model_id, instance)  # refuses an unknown one
        await self._keys.met_v1_caller(model_id)
        if self._keys.required and not self._keys.sender_is_trusted:
            raise failures.key_required(
                model_id,
                f'set engine_keys = "auto" in neuron.toml, or send the key and the header {ENGINE_KEYS_HEADER}',
            )
        for _ in range(_ATTEMPTS):
            model = await self._without_key(model_id, instance)
            if model.state is State.LOADED and model.engine is not None:
                self._refuse_keyed_part(model, model.engine)
                return model
            try:
                await self._load(model)
            except ServiceError as error:
                if error.code != ErrorCode.LOAD_CANCELLED:
                    self._unlisted.add(model_id)
                raise
        raise Unavailable(f"{model_id} is unloaded again and again", retry_after=_GONE_SECS)

    def _refuse_keyed_part(self, model: InstanceState, engine: Engine) -> None:
        """An engine that spans several neurons is not started again without its key: the other parts would be lost.

        Raises:
            Conflict: it serves only callers that send its key.
        """
        part = engine.spec.group
        if part is not None and part.serves and engine.api_key is not None and not self._keys.required:
            advice = f'send the key and the header {ENGINE_KEYS_HEADER}, or set engine_keys = "never" in neuron.toml'
            raise failures.key_required(str(model.key), f"its engine spans several neurons: {advice}")

    def _best(self, model_id: str, instance: str | None) -> InstanceState:
        """The instance to use: rather one without a needless key.

        Raises:
            NotFound: the model or the instance is unknown.
        """

        def preference(model: InstanceState) -> tuple[object, ...]:
            first, *rest = model.preference()
            return first, _with_needless_key(model, self._keys) is not None, *rest

        return min(self._registry.instances(model_id, instance), key=preference)

    async def _load(self, model: InstanceState) -> None:
        """Loads or wakes it. Where memory lacks, waits for engines without a key to become idle, and ends them."""
        deadline = time.monotonic() + ROOM_SECS
        while True:
            try:
                command = LoadCommand(model_id=model.model_id, instance=model.key.instance)
                await (await self._registry.load(command, carries_keys=False, displace=True)).loaded()
            except InsufficientVram:
                if model.state is State.SLEEPING:
                    self._registry.restart(model.key, "no memory to wake: it is loaded again")
                elif time.monotonic() >= deadline or not self._registry.room_may_come():
                    raise
                else:
                    await asyncio.sleep(_ROOM_POLL_SECS)
            else:
                return

    async def drop_key(self, key: InstanceKey) -> None:
        """Replaces the engine of a loaded instance if it has a key and need not have one.

        Raises:
            Unavailable: it still has requests after a minute. ServiceError: the load failed.
        """
        if _with_needless_key(self._registry.get(*key), self._keys) is not None:
            await self.until_usable(*key)

    async def _without_key(self, model_id: str, instance: str | None) -> InstanceState:
        """The instance to use. If it has a needless key, waits until one is idle, then stops its engine."""
        deadline = time.monotonic() + ROOM_SECS
        while True:
            model = self._best(model_id, instance)
            engine = _with_needless_key(model, self._keys)
            if engine is None:
                return model
            await engine.health.take_sample()
            if _with_needless_key(model, self._keys) is not engine:
                continue
            if not engine.health.busy:
                self._registry.restart(model.key, "restarts without a key for a caller that cannot send one")
                return model
            if time.monotonic() >= deadline:
                advice = (
                    "another cortex loaded it and uses it now. Retry when it is idle: neuron then restarts it without "
                    'a key. With engine_keys = "never" in neuron.toml no engine has one'
                )
                raise failures.key_required(str(model.key), advice, retry_after=_BUSY_SECS)
            await asyncio.sleep(_ROOM_POLL_SECS)

    def listed(self, views: Iterable[NeuronModelView]) -> list[NeuronModelView]:
        """The entries of `/models` that such a caller gets: once one has loaded something or asked for an endpoint,
        without parts of a group that have no server, since it would send requests to each that is loaded. Where a model
        has several, known implementations keep the last one's status, which is therefore that of the instance to
        use."""
        hidden = self._keys.v1_callers
        serving = [view for view in views if not hidden or view.group is None or view.group.serves]
        listed = [view for view in serving if view.id not in self._unlisted or view.status not in _NOT_RUNNING]
        first = {view.id: number for number, view in reversed(list(enumerate(listed)))}
        return sorted(listed, key=lambda view: (first[view.id], _USE.get(view.status, _ENDPOINT_HELPS)))

    def health(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The answer of `/health` as known implementations read it: whole numbers and, once there is such a caller, one
        entry for each model, and no `activation` of ours, for which they have another type."""
        devices = [_whole_figures(device) for device in figures["devices"]]
        told = {**figures, "uptime_secs": int(figures["uptime_secs"]), "devices": devices}
        if self._keys.v1_callers:
            del told["activation"]
            told["models"] = _summed(figures["models"])
        return told


def _with_needless_key(model: InstanceState, keys: EngineKeys) -> Engine | None:
    """The instance's engine, if it has a key and another engine would get none."""
    engine = model.engine
    if keys.required or model.state is not State.LOADED or engine is None or engine.spec.group is not None:
        return None
    return None if engine.api_key is None else engine


def _summed(activity: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of all instances of a model together, without `instance`."""
    models: dict[str, dict[str, Any]] = {}
    for engine in activity:
        total = models.setdefault(engine["id"], {**engine, **dict.fromkeys(_COUNTS, 0)})
        total.pop("instance", None)
        for name in _COUNTS:
            total[name] += engine[name] or 0
    return list(models.values())


def _whole_figures(device: Mapping[str, Any]) -> dict[str, Any]:
    whole = {name: round(device[name]) for name in _WHOLE if device[name] is not None}
    return {**device, **whole}
