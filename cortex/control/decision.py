"""Decides what a request needs. Pure: names and snapshots in, one decision out.

The first that holds decides: loaded, for an adapter that its base is, being loaded, loadable, unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cortex.config.catalogue import Catalogue
from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot
from cortex.placement.feasibility import possible_nodes
from cortex.placement.refusal import unknown_model_error
from cortex.routing.choice import beyond_ours
from cortex.routing.control import ContextBound
from cortex.routing.replica import ReplicaKey, ServedPaths
from shared.errors import ServiceError, Unavailable
from shared.protocol import ErrorCode, ModelStatus
from shared.retry_after import LOAD_TIMED_OUT_SECS


@dataclass(frozen=True)
class Serve:
    """The model is served by these replicas, least busy first."""

    replicas: tuple[ReplicaKey, ...]


@dataclass(frozen=True)
class Attach:
    """No engine has this adapter. One of these replicas of its base has to load it, least busy first."""

    replicas: tuple[ReplicaKey, ...]


@dataclass(frozen=True)
class Await:
    """This neuron is loading the model."""

    node: str


@dataclass(frozen=True)
class Place:
    """The model has to be loaded somewhere; the planner says where."""


@dataclass(frozen=True)
class Refuse:
    """The model cannot be served."""

    error: ServiceError


Decision = Serve | Attach | Await | Place | Refuse
InFlight = Callable[[ReplicaKey], int]
"""Requests of ours that a replica is working on."""

_LOADABLE = (ModelStatus.UNLOADED, ModelStatus.SLEEPING)

_TOKENIZER_FLAGS = ("--tokenizer", "--skip-tokenizer-init", "--revision", "--config")
"""vLLM's arguments, or how they begin, that may name another tokenizer."""


def decide(model_id: str, catalogue: Catalogue, fleet: FleetSnapshot, in_flight: InFlight) -> Decision:
    """What a request for `model_id` (an id or `id@variant`, not an alias) needs now."""
    engines = fleet.serving(model_id)
    if engines:
        return Serve(_least_busy(engines, in_flight))
    able = attachable(model_id, catalogue, fleet, in_flight)
    if able:
        return Attach(able)
    coming = fleet.loading_on(model_id)
    if coming is not None:
        return Await(coming.node.name)
    if model_id in catalogue.adapters and fleet.serving(catalogue.requested(model_id).name):
        return Refuse(without_adapters_error(model_id, catalogue))
    if catalogue.profile(model_id) is not None or _is_loadable(model_id, fleet):
        return Place()
    return Refuse(unknown_model_error(model_id, catalogue, fleet))


def attachable(adapter: str, catalogue: Catalogue, fleet: FleetSnapshot, in_flight: InFlight) -> tuple[ReplicaKey, ...]:
    """The replicas of the adapter's base that can load it and do not have it, least busy first; none for a model that
    is not an adapter."""
    if adapter not in catalogue.adapters:
        return ()
    of_base = fleet.serving(catalogue.requested(adapter).name)
    able = [each for each in of_base if each.view.max_loras and adapter not in each.view.adapters]
    return _least_busy(able, in_flight)


def without_adapters_error(adapter: str, catalogue: Catalogue) -> Unavailable:
    """The error if the base of an adapter is loaded where it cannot load the adapter."""
    base = catalogue.requested(adapter).name
    return Unavailable(
        f"{adapter!r} is an adapter of {base!r}, whose engines were started without adapters: unload {base!r}, so that "
        "it is loaded again with them",
        code=ErrorCode.ADAPTER_FAILED,
        retry_after=LOAD_TIMED_OUT_SECS,
    )


def context_bound(
    model_id: str, catalogue: Catalogue, served: Callable[[ModelProfile], int | None]
) -> ContextBound | None:
    """The most context that an engine of `model_id` (as for `decide`) can have once it is loaded; None if that is not
    known, or if such an engine might serve a longer prompt in another way.

    `served`: how much engines like this one had, wherever it may be loaded.
    """
    profile = catalogue.profile(model_id)
    choices = () if profile is None else profile.choices
    lengths = [_context_of(choice, served) for choice in choices]
    known = [length for length in lengths if length is not None]
    if not known or len(known) < len(lengths):
        return None
    own = model_id in catalogue.adapters  # its weights may come with another tokenizer
    sources = {"" if own or _names_tokenizer(choice) else choice.source or choice.id for choice in choices}
    return ContextBound(max(known), sources.pop() if len(sources) == 1 else "")


def served_paths(model_id: str, catalogue: Catalogue, fleet: FleetSnapshot) -> ServedPaths | None:
    """What engines of `model_id` (as for `decide`) serve on all nodes that can hold it; None unless all tell."""
    profile = catalogue.profile(model_id)
    harnesses: dict[str, None] = {}
    paths: dict[str, None] = {}
    for choice in () if profile is None else profile.choices:
        for node in possible_nodes(choice, fleet):
            told = None if node.discovery is None else node.discovery.harness_paths.get(choice.harness)
            if told is None:
                return None
            harnesses[choice.harness] = None
            paths |= dict.fromkeys(told)
    return ServedPaths(tuple(harnesses), tuple(paths)) if harnesses else None


def _names_tokenizer(choice: ModelProfile) -> bool:
    """Its arguments may have the engine use another tokenizer than that of the source."""
    return any(arg.replace("_", "-").startswith(_TOKENIZER_FLAGS) for arg in choice.args)


def _context_of(choice: ModelProfile, served: Callable[[ModelProfile], int | None]) -> int | None:
    if not choice.serves_as_vllm:
        return None
    return choice.max_model_len if isinstance(choice.max_model_len, int) else served(choice)


def _is_loadable(model_id: str, fleet: FleetSnapshot) -> bool:
    """For a model outside the catalogue: a healthy neuron can load it again, now or after its eviction."""
    return any(
        engine.node.healthy and (engine.view.known_status in _LOADABLE or engine.key in fleet.evicting)
        for engine in fleet.engines(model_id)
    )


def _least_busy(engines: list[EngineSnapshot], in_flight: InFlight) -> tuple[ReplicaKey, ...]:
    """In the order in which a worker chooses for a request without a key. Only workers measure engines' speed, so the
    outstanding requests decide, then the names."""
    if len(engines) == 1:
        return (engines[0].key,)
    found: list[tuple[int, ReplicaKey]] = []
    for node, _, key in engines:
        outstanding = in_flight(key)
        activity = node.activity.get((key.model_id, key.instance))
        if activity is not None:
            outstanding += beyond_ours(activity.in_flight, activity.queue_depth, outstanding)
        found.append((outstanding, key))
    found.sort()
    return tuple([key for _, key in found])
