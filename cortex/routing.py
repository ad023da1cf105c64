"""What is to be done for a request. Pure: names and snapshots in, one decision out.

The order is the contract's: loaded, on its way, known but unloaded, in the catalogue, nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cortex.catalogue import Catalogue, ModelProfile
from cortex.placement import candidate_on, infeasible_reason, is_feasible, place
from cortex.proxy.choice import beyond_ours, work
from cortex.snapshot import FleetSnapshot, NodeSnapshot
from shared.errors import NotFound, ServiceError, Unavailable
from shared.protocol import LoadCommand, ModelStatus

RETRY_AFTER_NODE_SECS = 5
"""When to come back for a neuron that is down: about what noticing its return takes."""


@dataclass(frozen=True)
class Serve:
    """The model is loaded on these neurons, least busy first."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Await:
    """The model is on its way on this neuron."""

    node: str


@dataclass(frozen=True)
class Load:
    """The model has to be loaded on this neuron, with this command; `share_mb` MiB are taken on each device."""

    node: str
    command: LoadCommand
    share_mb: int
    reason: str


@dataclass(frozen=True)
class Refuse:
    """The model cannot be served now."""

    error: ServiceError


Decision = Serve | Await | Load | Refuse
InFlight = Callable[[str, str], int]
"""Requests of ours that a model on a node is working on: (model id, node name) -> count."""


def decide(model_id: str, catalogue: Catalogue, fleet: FleetSnapshot, in_flight: InFlight) -> Decision:
    """What a request for `model_id` (an id, not an alias) needs now."""
    nodes = serving_nodes(model_id, fleet)
    if nodes:
        return Serve(_least_busy(model_id, nodes, in_flight))
    holders = [node for node in fleet.holders(model_id) if node.healthy]
    for node in holders:
        status = node.status_of(model_id)
        if status is not None and status.coming:
            return Await(node.name)
    profile = catalogue.profile(model_id)
    known = [node for node in holders if not node.draining and _can_load_again(node, model_id)]
    if known:
        return _load_again(model_id, profile, fleet, known)
    if profile is not None:
        return decide_placement(profile, fleet)
    return Refuse(_unknown(model_id, fleet))


def serving_nodes(model_id: str, fleet: FleetSnapshot) -> list[NodeSnapshot]:
    """The neurons whose engine may get a request for the model now. A draining one gets none while another can serve;
    with nobody else its model still answers."""
    loaded = [
        node for node in fleet.holders(model_id) if node.healthy and node.status_of(model_id) is ModelStatus.LOADED
    ]
    return [node for node in loaded if not node.draining] or loaded


def decide_placement(profile: ModelProfile, fleet: FleetSnapshot) -> Load | Refuse:
    """A new place for a model of the catalogue that no healthy neuron holds."""
    best = place(profile, fleet)
    if best is None:
        return Refuse(_no_place(profile, fleet))
    return Load(best.node, load_command(profile, best.devices), profile.device_share_mb, f"{best.node}: {best.reason}")


def load_on(profile: ModelProfile, fleet: FleetSnapshot, node: NodeSnapshot) -> Load:
    """The load of a model of the catalogue on a given, feasible node. A model that sleeps there has its spec and its
    devices, and with others its neuron would not wake it."""
    if node.status_of(profile.id) is ModelStatus.SLEEPING:
        if _remembers_specs(node):
            return Load(node.name, LoadCommand(model_id=profile.id), 0, "asleep there")
        indices = tuple(node.models[profile.id].devices or ())
        if len(indices) == profile.min_devices:
            return Load(node.name, load_command(profile, indices), 0, "asleep there")
    found = candidate_on(profile, fleet, node)
    return Load(node.name, load_command(profile, found.devices), profile.device_share_mb, found.reason)


def load_command(profile: ModelProfile, devices: tuple[int, ...]) -> LoadCommand:
    """What a neuron is told about a model of the catalogue."""
    return LoadCommand(
        model_id=profile.id,
        harness=profile.harness,
        quant=profile.quant,
        tensor_parallel=profile.tensor_parallel,
        devices=list(devices),
        source=profile.source,
        args=list(profile.args),
        vram_mb=profile.vram_mb,
    )


def _least_busy(model_id: str, nodes: list[NodeSnapshot], in_flight: InFlight) -> tuple[str, ...]:
    """As a worker chooses for a request without a key. How fast the engines are only workers measure."""

    def order(node: NodeSnapshot) -> tuple[float, str]:
        outstanding, activity = in_flight(model_id, node.name), node.activity.get(model_id)
        if activity is not None:
            outstanding += beyond_ours(activity.in_flight, activity.queue_depth, outstanding)
        return work(outstanding, 1.0), node.name

    return tuple(node.name for node in sorted(nodes, key=order))


def _can_load_again(node: NodeSnapshot, model_id: str) -> bool:
    return node.status_of(model_id) in (ModelStatus.UNLOADED, ModelStatus.SLEEPING)


def _load_again(model_id: str, profile: ModelProfile | None, fleet: FleetSnapshot, nodes: list[NodeSnapshot]) -> Load:
    """A sleeping model wakes faster than an unloaded one loads. The catalogue's word on the model is sent where the
    node fits it; else the neuron uses the spec it remembers."""
    node = min(nodes, key=lambda n: (n.status_of(model_id) is not ModelStatus.SLEEPING, n.name))
    if profile is not None and is_feasible(profile, node):
        return load_on(profile, fleet, node)
    return Load(node.name, command_for_known(node, model_id), 0, "known there")


def command_for_known(node: NodeSnapshot, model_id: str) -> LoadCommand:
    """Asks a neuron for a model that only it knows. Ours remember the spec; a seed neuron is told what it lists."""
    if _remembers_specs(node):
        return LoadCommand(model_id=model_id)
    view = node.models[model_id]
    tensor_parallel = len(view.devices) if len(view.devices) > 1 else None
    return LoadCommand(
        model_id=model_id, harness=view.harness, tensor_parallel=tensor_parallel, devices=view.devices or None
    )


def _remembers_specs(node: NodeSnapshot) -> bool:
    """True for neurons of ours, and for one that is not known yet; a seed neuron has no instance id."""
    return node.discovery is None or node.discovery.instance_id is not None


def _no_place(profile: ModelProfile, fleet: FleetSnapshot) -> ServiceError:
    """Why no healthy neuron takes the model: none is there, the right one is away, or none can ever hold it."""
    if not fleet.healthy:
        return _no_healthy_neurons()
    possible = [node for node in fleet.nodes.values() if infeasible_reason(profile, node) is None]
    if not possible:
        reasons = "; ".join(f"{node.name}: {infeasible_reason(profile, node)}" for node in fleet.nodes.values())
        return NotFound(
            f"no neuron can hold the model {profile.id!r} ({reasons})", code="no_feasible_neuron", param="model"
        )
    names = ", ".join(f"{node.name} ({_absence(node)})" for node in possible)
    return Unavailable(
        f"the model {profile.id!r} can only run on neurons that are away now: {names}",
        code="neuron_unavailable",
        retry_after=RETRY_AFTER_NODE_SECS,
    )


def _absence(node: NodeSnapshot) -> str:
    if node.healthy:
        return "draining"
    return "down" if node.discovery is not None else "not reached yet"


def _unknown(model_id: str, fleet: FleetSnapshot) -> ServiceError:
    """The model is not in the catalogue and on no healthy neuron in a state that could serve."""
    for node in fleet.holders(model_id):
        view = node.models[model_id]
        if not node.healthy:
            return Unavailable(
                f"the model {model_id!r} is on {node.name}, which is down now",
                code="neuron_unavailable",
                retry_after=RETRY_AFTER_NODE_SECS,
            )
        if view.known_status is ModelStatus.FAILED:
            return Unavailable(
                f"the model {model_id!r} failed on {node.name}: {view.error or 'no reason given'}",
                code="cold_load_failed",
                retry_after=RETRY_AFTER_NODE_SECS,
            )
        return Unavailable(
            f"the model {model_id!r} is {view.status!r} on {node.name}",
            code="neuron_unavailable",
            retry_after=RETRY_AFTER_NODE_SECS,
        )
    if not fleet.healthy and any(node.discovery is None for node in fleet.nodes.values()):
        return _no_healthy_neurons()  # one that has never answered may well have the model
    return NotFound(f"the model {model_id!r} does not exist", code="model_not_found", param="model")


def _no_healthy_neurons() -> ServiceError:
    return Unavailable("no neuron is healthy", code="no_healthy_neurons", retry_after=RETRY_AFTER_NODE_SECS)
