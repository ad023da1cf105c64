"""The state of the fleet: everything cortex knows about its neurons.

Observations come in (a poll answered, a poll missed, an event, a finished load), immutable snapshots go out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from cortex.fleet.snapshot import (
    EngineName,
    FleetSnapshot,
    Instances,
    NodeSnapshot,
    Reservation,
    by_instance,
    instance_of,
    with_different_routes,
)
from cortex.fleet.variant_labels import VariantLabels
from cortex.routing.replica import ReplicaKey
from shared.protocol import Discovery, EndpointReply, ModelStatus, ModelView, NeuronHealth
from shared.subscribers import Subscribers

log = logging.getLogger(__name__)


class NodeRemoved(Exception):
    """The neuron is no longer in the configuration."""


class RouteChanges:
    """Collects the models that a fleet's `route_changes` announces, until `close`. Other polls do not wake it: a
    thousand neurons send five hundred answers a second."""

    def __init__(self, fleet: Fleet) -> None:
        self._models: set[str] = set()
        self._came = asyncio.Event()
        self.close = fleet.route_changes.subscribe(self.add)

    def add(self, models: Iterable[str]) -> None:
        self._models.update(models)
        if self._models:
            self._came.set()

    async def next(self) -> set[str]:
        """The ids collected since the last call; waits for one."""
        await self._came.wait()
        self._came.clear()
        models, self._models = self._models, set()
        return models


class Fleet:
    """Reduces observations to a state; every change has a version and wakes its waiters. Reports about a
    neuron that is no longer in the configuration are ignored."""

    def __init__(
        self,
        nodes: Iterable[tuple[str, str]],
        *,
        unhealthy_after: int,
        drained: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`nodes` are pairs of name and endpoint; `unhealthy_after` is in consecutive misses; `drained` are names."""
        self._nodes = {name: NodeSnapshot(name, endpoint, draining=name in drained) for name, endpoint in nodes}
        self._unhealthy_after = unhealthy_after
        self._clock = clock
        self._labels = VariantLabels()
        self._reservations: list[Reservation] = []
        self._evicting: frozenset[ReplicaKey] = frozenset()
        # When something other than a poll last reported an engine, by node and engine. A poll that began before that is
        # out of date and must not undo it.
        self._reported_at: dict[str, dict[EngineName, float]] = {name: {} for name in self._nodes}
        self._unseen = set(self._nodes)  # not polled yet
        self._version = 0
        self._snapshot: FleetSnapshot | None = None
        self._changed: asyncio.Future[None] | None = None
        self._node_changed: dict[str, asyncio.Future[None]] = {}
        self.route_changes: Subscribers[[set[str]]] = Subscribers()
        """Announces the models whose routes may have changed."""
        self.down_changes: Subscribers[[]] = Subscribers()
        """Announces that `down` has changed."""
        self._down: frozenset[str] = frozenset()
        # Model id -> neurons that list it, in the order of the configuration. Replaced, not changed, because snapshots
        # share it; kept across polls, because models rarely change.
        self._holders: Mapping[str, tuple[str, ...]] = {}
        self._position = {name: position for position, name in enumerate(self._nodes)}
        self._topology = object()

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._version

    def snapshot(self) -> FleetSnapshot:
        """The current state; the same object until something changes."""
        if self._snapshot is None:
            self._snapshot = FleetSnapshot(
                MappingProxyType(dict(self._nodes)),
                tuple(self._reservations),
                self._evicting,
                index=self._holders,
                topology=self._topology,
                catalogue=self._labels.catalogue,
            )
        return self._snapshot

    def node(self, name: str) -> NodeSnapshot:
        """The current state of one neuron; much cheaper than a snapshot of all."""
        return self._nodes[name]

    def position(self, name: str) -> int:
        """The neuron's place in the configuration, from 0."""
        return self._position[name]

    async def changed_since(self, version: int) -> int:
        """Waits until the version differs from `version`; returns the new one."""
        while self._version == version:
            if self._changed is None:
                self._changed = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._changed)
        return self._version

    async def until(self, name: str, condition: Callable[[NodeSnapshot], bool]) -> NodeSnapshot:
        """Waits until the condition holds for a neuron. Checked again only when that neuron changes.

        Raises:
            NodeRemoved: it is no longer in the configuration.
        """
        while True:
            node = self._nodes.get(name)
            if node is None:
                raise NodeRemoved(name)
            if condition(node):
                return node
            if name not in self._node_changed:
                self._node_changed[name] = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._node_changed[name])

    @property
    def down(self) -> frozenset[str]:
        """The neurons that were healthy and now count as down."""
        return self._down

    @property
    def all_polled(self) -> bool:
        """Whether each neuron has answered a poll or missed one; before that the fleet is unknown."""
        return not self._unseen

    async def until_all_polled(self) -> None:
        """Waits until `all_polled`."""
        version = self._version
        while self._unseen:
            version = await self.changed_since(version)

    def configure(
        self, nodes: Iterable[tuple[str, str]], *, unhealthy_after: int, drained: Collection[str] = ()
    ) -> None:
        """Replaces the list of neurons; arguments as for `__init__`. A neuron that stays keeps its state, even at a new
        endpoint: usually it is the same neuron at another address. The next poll shows whether it is."""
        before = self._nodes
        self._unhealthy_after = unhealthy_after
        self._nodes = {}
        for name, endpoint in nodes:
            node = before.get(name) or NodeSnapshot(name, endpoint, draining=name in drained)
            moved = node.endpoint != endpoint
            self._nodes[name] = replace(node, endpoint=endpoint, misses=0, last_error=None) if moved else node
        self._topology = object()
        self._position = {name: position for position, name in enumerate(self._nodes)}
        self._reported_at = {name: self._reported_at.get(name, {}) for name in self._nodes}
        holders: dict[str, list[str]] = {}
        for node in self._nodes.values():
            for model_id in node.models:
                holders.setdefault(model_id, []).append(node.name)
        self._holders = {model_id: tuple(names) for model_id, names in holders.items()}
        left = before.keys() - self._nodes.keys()
        self._set_down(self._down - left)
        self._unseen = (self._unseen - left) | (self._nodes.keys() - before.keys())
        for name in left & self._node_changed.keys():
            self._node_changed.pop(name).set_result(None)
        self._mark_changed()
        self._notify_routes({model_id for name in left for model_id in before[name].models})

    def use_variants(self, labels: VariantLabels) -> None:
        """From now on these say which variants there are."""
        self._labels = labels
        for node in list(self._nodes.values()):
            self._replace(labels.on_all(node))
        self._mark_changed()

    def notify(self) -> None:
        """Wakes the followers: something that is shown together with the fleet has changed."""
        self._mark_changed()

    def record_poll(
        self,
        name: str,
        *,
        started: float,
        health: NeuronHealth,
        models: Iterable[ModelView] | None,
        discovery: Discovery | None,
        ignored_fields: tuple[str, ...] = (),
    ) -> None:
        """Records an answered poll that began at `started`. `models` or `discovery` None: as before. An answer that
        changes nothing wakes no waiter."""
        node = self._nodes.get(name)
        if node is None:
            return
        if discovery is None or discovery == node.discovery:
            discovery = node.discovery
        known = node.models if models is None else self._merged(node, models, started, discovery)
        self._unseen.discard(name)
        answered = node.healthy and not node.misses and node.last_error is None
        same = health is node.health and known is node.models and discovery is node.discovery
        if answered and same and ignored_fields == node.ignored_fields:
            return
        if not node.healthy:
            log.info("neuron %s is healthy", name)
        self._replace(
            replace(
                node,
                healthy=True,
                misses=0,
                last_error=None,
                silent_since=None,
                discovery=discovery,
                health=health,
                health_at=node.health_at if health is node.health else self._clock(),
                models=known,
                ignored_fields=ignored_fields,
            )
        )

    def _merged(
        self, node: NodeSnapshot, models: Iterable[ModelView], started: float, discovery: Discovery | None
    ) -> Mapping[str, Instances]:
        """The engines of a poll, except those with newer reports."""
        reported = self._reported_at[node.name] = {
            name: when for name, when in self._reported_at[node.name].items() if when > started
        }
        now = node if discovery is node.discovery else replace(node, discovery=discovery)
        views = (self._labels.on(view, now) for view in models)
        merged = by_instance(view for view in views if (view.id, instance_of(view)) not in reported)
        for model_id, instance in reported:
            known = node.view(model_id, instance)
            if known is not None:
                merged.setdefault(model_id, {})[instance] = known
        if merged == node.models:
            return node.models
        # What is unchanged stays the same object, so that followers need not compare it.
        return MappingProxyType({m: node.models[m] if node.models.get(m) == new else new for m, new in merged.items()})

    def record_miss(self, name: str, reason: str) -> None:
        """Records a failed poll."""
        node = self._nodes.get(name)
        if node is None:
            return
        self._unseen.discard(name)
        misses = node.misses + 1
        healthy = node.healthy and misses < self._unhealthy_after
        if node.healthy and not healthy:
            log.warning("neuron %s is unhealthy after %d failed polls: %s", name, misses, reason)
        elif node.last_error != reason:
            log.warning("neuron %s does not answer: %s", name, reason)
        since = time.time() if node.silent_since is None else node.silent_since
        self._replace(replace(node, healthy=healthy, misses=misses, last_error=reason, silent_since=since))

    def update_model(self, name: str, view: ModelView) -> None:
        """Records an engine that a neuron reported outside a poll (an event, a finished load)."""
        node = self._nodes.get(name)
        if node is None:
            return
        instance, view = instance_of(view), self._labels.on(view, node)
        self._reported_at[name][view.id, instance] = self._clock()
        if node.view(view.id, instance) != view:
            there = {**node.instances(view.id), instance: view}
            self._replace(replace(node, models=MappingProxyType({**node.models, view.id: there})))

    def remove_model(self, name: str, model_id: str, instance: str | None = None) -> None:
        """Records that a neuron no longer lists an engine, or any engine of the model without `instance`."""
        node = self._nodes.get(name)
        if node is None:
            return
        there = node.instances(model_id)
        gone = tuple(there) or ("",) if instance is None else (instance,)
        for each in gone:
            self._reported_at[name][model_id, each] = self._clock()
        if any(each in there for each in gone):
            rest = {each: view for each, view in there.items() if each not in gone}
            others = {other: views for other, views in node.models.items() if other != model_id}
            self._replace(replace(node, models=MappingProxyType({**others, model_id: rest} if rest else others)))

    def loaded(
        self,
        key: ReplicaKey,
        *,
        harness: str | None,
        devices: Iterable[int],
        variant: str | None = None,
        endpoint: EndpointReply | None = None,
    ) -> None:
        """Records a finished load: the engine counts as loaded before the next poll."""
        model_id, name, instance = key
        node = self._nodes.get(name)
        if node is None:
            return
        known = node.view(model_id, instance)
        if known is not None and known.loaded:
            self._reported_at[name][model_id, instance] = self._clock()
            return
        kept = {} if known is None else known.model_dump(include={"max_loras", "adapters"})  # if it slept
        view = ModelView(
            id=model_id,
            instance=instance or None,
            variant=variant,
            harness=harness,
            status=ModelStatus.LOADED.value,
            devices=list(devices),
            endpoint=endpoint,
            **kept,
        )
        self.update_model(name, view)

    def set_draining(self, name: str, draining: bool) -> None:
        """For an operator: takes a neuron out of placement and routing, or puts it back."""
        self._replace(replace(self._nodes[name], draining=draining))

    def reserve(self, reservation: Reservation) -> None:
        """Counts a load's VRAM as taken until `release`."""
        self._reservations.append(reservation)
        self._mark_changed()

    def release(self, reservation: Reservation) -> None:
        self._reservations.remove(reservation)
        self._mark_changed()

    def begin_eviction(self, key: ReplicaKey) -> None:
        """An engine is being evicted: it gets no new requests until `end_eviction`."""
        self._set_evicting(self._evicting | {key}, key.model_id)

    def end_eviction(self, key: ReplicaKey) -> None:
        """The eviction is over, done or cancelled."""
        self._set_evicting(self._evicting - {key}, key.model_id)

    def _set_evicting(self, evicting: frozenset[ReplicaKey], model_id: str) -> None:
        self._evicting = evicting
        self._mark_changed()
        self._notify_routes({model_id})

    def _notify_routes(self, models: set[str]) -> None:
        if models:
            self.route_changes.announce(models)

    def _replace(self, node: NodeSnapshot) -> None:
        before, self._nodes[node.name] = self._nodes[node.name], node
        if before.discovery is not node.discovery:
            self._topology = object()
        if before.models is not node.models and before.models.keys() != node.models.keys():
            self._index(node.name, gone=before.models.keys() - node.models.keys(), models=node.models)
        if before.healthy != node.healthy:
            self._set_down(self._down - {node.name} if node.healthy else self._down | {node.name})
        affected = with_different_routes(before, node)
        waiting = self._node_changed.pop(node.name, None)
        if waiting is not None:
            waiting.set_result(None)
        self._mark_changed()
        self._notify_routes(affected)

    def _set_down(self, down: frozenset[str]) -> None:
        if down != self._down:
            self._down = down
            self.down_changes.announce()

    def _index(self, name: str, *, gone: Iterable[str], models: Iterable[str]) -> None:
        """Updates the holders for one neuron."""
        holders = dict(self._holders)
        for model_id in models:
            known = holders.get(model_id, ())
            if name not in known:
                holders[model_id] = tuple(sorted((*known, name), key=self._position.__getitem__))
        for model_id in gone:
            holders[model_id] = tuple(holder for holder in holders[model_id] if holder != name)
            if not holders[model_id]:
                del holders[model_id]
        self._holders = holders

    def _mark_changed(self) -> None:
        self._version += 1
        self._snapshot = None
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None
