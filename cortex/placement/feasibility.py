"""Which nodes could ever hold a model: the rule, and a cache of its answers for whole fleets. Pure."""

from __future__ import annotations

from typing import NamedTuple

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.placement.devices import eligible_devices
from shared.protocol import Discovery


def infeasible_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    """Why the node's topology can never hold the model; None when it can, or when it is not known yet.

    `vram_mb` and the node's health play no part.
    """
    if profile.pinned_on and node.name not in profile.pinned_on:
        return f"pinned on {', '.join(profile.pinned_on)}"
    if node.discovery is None:
        return None
    unsupported = _unsupported_reason(profile, node.discovery)
    if unsupported is not None:
        return unsupported
    if len(node.devices) < profile.device_count:
        return f"needs {profile.device_count} devices, has {len(node.devices)}"
    enough = len(eligible_devices(profile, node))
    if enough < profile.device_count:
        return (
            f"needs {profile.device_count} devices with {profile.min_device_vram_mb} MiB in total, "
            f"{enough} of {len(node.devices)} have that"
        )
    return None


def _unsupported_reason(profile: ModelProfile, discovery: Discovery) -> str | None:
    if profile.harness not in discovery.harnesses:
        offered = ", ".join(discovery.harnesses) or "none"
        return f"harness {profile.harness!r} is not offered (offered: {offered})"
    if not profile.parallelism.tensor_only and not _knows_parallel(discovery):
        return f"protocol v1 neurons can only split a model by tensor parallelism, not as {profile.parallelism}"
    return None


def _knows_parallel(discovery: Discovery) -> bool:
    """A protocol v1 neuron knows only `tensor_parallel`, and would load the model in another way."""
    return discovery.instance_id is not None


def is_feasible(profile: ModelProfile, node: NodeSnapshot) -> bool:
    """True when the node's topology is known and can hold the model."""
    return node.discovery is not None and infeasible_reason(profile, node) is None


def is_feasible_elsewhere(profile: ModelProfile | None, fleet: FleetSnapshot, name: str) -> bool:
    """True when a usable node other than this one can hold the model. False for a model outside the catalogue."""
    return profile is not None and any(
        node.healthy and not node.draining and node.name != name and is_feasible(profile, node)
        for node in fleet.nodes.values()
    )


class _Topology(NamedTuple):
    """The properties of a neuron that the rule looks at. Neurons that share them can hold the same models."""

    harnesses: frozenset[str]
    knows_parallel: bool
    totals_mb: tuple[int, ...]  # of the usable devices, ascending


class _Requirement(NamedTuple):
    """The properties of a model that the rule looks at, except `pinned_on`."""

    harness: str
    devices: int
    tensor_only: bool
    min_device_vram_mb: int | None


class FeasibilityCache:
    """`is_feasible` for whole fleets, for large fleets and catalogues: evaluated once per kind of topology. Answers
    always follow from the snapshot given; only what is unchanged since the last call is reused."""

    def __init__(self) -> None:
        self._followed: object = None  # topology of the snapshot that the rest was computed from
        self._discoveries: dict[str, Discovery | None] = {}
        self._topologies: dict[str, _Topology | None] = {}  # in the order of the configuration
        self._position: dict[str, int] = {}
        self._examples: dict[_Topology, NodeSnapshot] = {}
        self._verdicts: dict[tuple[_Requirement, _Topology], bool] = {}
        self._found: dict[tuple[_Requirement, tuple[str, ...]], tuple[str, ...]] = {}
        self._outdated: dict[tuple[_Requirement, tuple[str, ...]], tuple[str, ...]] = {}

    def nodes(self, profile: ModelProfile, fleet: FleetSnapshot) -> tuple[str, ...]:
        """The neurons whose topology is known and can hold the model, healthy or not, in configuration order. Returns
        the same object while the answer is the same."""
        if fleet.topology is None or fleet.topology is not self._followed:
            self._follow(fleet)
        requirement = _Requirement(
            profile.harness, profile.device_count, profile.parallelism.tensor_only, profile.min_device_vram_mb
        )
        key = requirement, profile.pinned_on
        found = self._found.get(key)
        if found is None:
            found, before = self._find(requirement, profile), self._outdated.pop(key, None)
            found = self._found[key] = before if before == found else found
        return found

    def _follow(self, fleet: FleetSnapshot) -> None:
        """Reads the topology of every neuron; if any has changed, drops the answers."""
        before = self._topologies
        topologies: dict[str, _Topology | None] = {}
        for name, node in fleet.nodes.items():
            if name in before and self._discoveries[name] is node.discovery:
                topologies[name] = before[name]
            else:
                topologies[name] = _topology(node)
                self._discoveries[name] = node.discovery
            topology = topologies[name]
            if topology is not None and topology not in self._examples:
                self._examples[topology] = node
        if list(topologies.items()) != list(before.items()):
            self._topologies = topologies
            self._position = {name: position for position, name in enumerate(topologies)}
            self._discoveries = {name: self._discoveries[name] for name in topologies}
            kinds = {topology for topology in topologies.values() if topology is not None}
            self._examples = {topology: self._examples[topology] for topology in kinds}
            self._verdicts = {key: verdict for key, verdict in self._verdicts.items() if key[1] in kinds}
            self._outdated |= self._found
            self._found = {}
        self._followed = fleet.topology

    def _find(self, requirement: _Requirement, profile: ModelProfile) -> tuple[str, ...]:
        names = sorted(self._position.keys() & profile.pinned_on, key=self._position.__getitem__)
        return tuple(name for name in names or self._unpinned(profile) if self._holds(requirement, profile, name))

    def _unpinned(self, profile: ModelProfile) -> list[str]:
        return [] if profile.pinned_on else list(self._position)

    def _holds(self, requirement: _Requirement, profile: ModelProfile, name: str) -> bool:
        topology = self._topologies[name]
        if topology is None:
            return False
        verdict = self._verdicts.get((requirement, topology))
        if verdict is None:
            anywhere = profile.model_copy(update={"pinned_on": ()})
            verdict = infeasible_reason(anywhere, self._examples[topology]) is None
            self._verdicts[requirement, topology] = verdict
        return verdict


def _topology(node: NodeSnapshot) -> _Topology | None:
    if node.discovery is None:
        return None
    totals = tuple(sorted(device.vram_total_mb for device in node.devices))
    return _Topology(frozenset(node.discovery.harnesses), _knows_parallel(node.discovery), totals)
