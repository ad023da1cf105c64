"""Which nodes could ever hold a model: the rule, and a cache of its answers for whole fleets. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from cortex.config.profile import ModelProfile
from cortex.fleet.engine_url import dials
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.placement.devices import as_version, eligible_devices
from cortex.placement.spans import spans_of
from shared.protocol import Discovery, Parallelism


def infeasible_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    """Why the node's topology can never hold the model, in any of its variants; None when it can, or when it is not
    known yet.

    The node's health plays no part, and `vram_mb` only for a model on the CPU: it may be wrong by much for a GPU, where
    neuron measures, but RAM is booked by it.
    """
    if not profile.variants:
        return _infeasible_reason(profile, node)
    reasons = {choice.variant: _infeasible_reason(choice, node) for choice in profile.choices}
    if None in reasons.values():
        return None
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{variant} {reason}" for variant, reason in reasons.items())


def feasible_choices(profile: ModelProfile, node: NodeSnapshot) -> list[ModelProfile]:
    """The variants that the node can hold, in the catalogue's order; without variants the model itself."""
    return [choice for choice in profile.choices if _infeasible_reason(choice, node) is None]


def oversize_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    """Why a feasible node could not hold the model in one of its `choices` even if it were empty, by the catalogue's
    figures; None when it could."""
    share, size = profile.device_share_mb, profile.shares
    totals = sorted((each.vram_total_mb or share for each in eligible_devices(profile, node)), reverse=True)
    if size <= len(totals) and totals[size - 1] < share:
        where = "of RAM" if profile.on_cpu else "on each device"
        return f"needs {share} MiB {where}, more than the {totals[size - 1]} MiB in total"
    return None


def _infeasible_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    if profile.pinned_on and node.name not in profile.pinned_on:
        return f"pinned on {', '.join(profile.pinned_on)}"
    if node.discovery is None:
        return None
    unsupported = _unsupported_reason(profile, node.discovery)
    if unsupported is not None:
        return unsupported
    if profile.on_cpu:
        if node.ram is None:
            return "runs on the CPU, and the neuron does not tell how much RAM it has"
        return oversize_reason(profile, node)
    return _too_few_reason(profile, node)


def _too_few_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    """Why its devices are not enough."""
    reason = _too_few_devices_reason(profile, node)
    if reason is not None and profile.span_nodes and dials(node.endpoint):
        return f'{reason}; with dial = "out" it shares no engine with other hosts, which cannot connect to it'
    return reason


def _too_few_devices_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    needed, usable = profile.device_count, len(node.devices)
    if not usable:
        gpus = "a GPU" if needed == 1 else f"{needed} GPUs"
        return f"needs {gpus}, has none: only models with devices = 0 run here"
    if usable < needed:
        return f"needs {needed} devices, has {usable}"
    slices = sum(device.is_mig_instance for device in node.devices) if profile.combines_devices else 0
    if usable - slices < needed:
        devices = f"{needed} device{'' if needed == 1 else 's'} that can work with others"
        return f"needs {devices}, has {usable - slices}: {slices} of {usable} are MIG instances"
    enough = len(eligible_devices(profile, node))
    if enough < needed:
        return f"needs {_needed_devices(profile)}, {enough} of {usable} have that"
    return None


def _needed_devices(profile: ModelProfile) -> str:
    memory = "" if profile.min_device_vram_mb is None else f"{profile.min_device_vram_mb} MiB in total"
    capability = profile.min_compute_capability
    parts = [memory, "" if capability is None else f"compute capability {capability}"]
    count = profile.device_count
    return f"{count} device{'' if count == 1 else 's'} with {' and '.join(filter(None, parts))}"


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


def reports_variants(node: NodeSnapshot) -> bool:
    """Whether the node says which variant of a model it has loaded."""
    return node.discovery is not None and node.discovery.instances


def inferred_variant(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    """The variant that a node has which does not report it: the first that it can hold, as it gets no other one. None
    for a model without variants, or if there is no such variant."""
    feasible = feasible_choices(profile, node)
    feasible.sort(key=lambda choice: oversize_reason(choice, node) is not None)
    return feasible[0].variant if feasible else None


def is_feasible(profile: ModelProfile, node: NodeSnapshot) -> bool:
    """True when the node's topology is known and can hold the model."""
    return node.discovery is not None and infeasible_reason(profile, node) is None


def can_hold_part(part: ModelProfile, node: NodeSnapshot) -> bool:
    """True when the node's topology is known and can hold this part of an engine that spans several nodes."""
    return _can_span(node) and is_feasible(part, node)


def _can_span(node: NodeSnapshot) -> bool:
    """Whether other hosts can connect to its part of an engine."""
    return node.discovery is not None and node.discovery.groups and not dials(node.endpoint)


def possible_nodes(profile: ModelProfile, fleet: FleetSnapshot) -> list[NodeSnapshot]:
    """The nodes that can hold the model, alone or with others, or whose topology is not known yet."""
    nodes = list(fleet.nodes.values())
    found = {node.name for node in nodes if infeasible_reason(profile, node) is None}
    for span in (span for choice in profile.choices for span in spans_of(choice)):
        together = {node.name for node in nodes if can_hold_part(span.part, node)}
        if len(together) >= span.hosts:
            found |= together
    return [node for node in nodes if node.name in found]


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
    knows_groups: bool
    devices: tuple[tuple[int, tuple[int, ...], bool], ...]
    """Memory, compute capability and whether it is a MIG instance, of the usable ones, ascending."""
    ram_mb: int | None


class _Requirement(NamedTuple):
    """The properties of a model that the rule looks at, except `pinned_on`."""

    harness: str
    devices: int
    combines_devices: bool
    tensor_only: bool
    min_device_vram_mb: int | None
    min_compute_capability: str | None
    spanned: Parallelism | None  # with `span_nodes`: how it is split over all hosts
    explicit: bool  # the model says that itself
    ram_mb: int  # of a model on the CPU


_Question: TypeAlias = tuple[tuple[_Requirement, tuple[str, ...]], ...]
"""Each variant's requirement and `pinned_on`."""


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
        self._found: dict[_Question, tuple[str, ...]] = {}
        self._outdated: dict[_Question, tuple[str, ...]] = {}

    def nodes(self, profile: ModelProfile, fleet: FleetSnapshot) -> tuple[str, ...]:
        """The neurons whose topology is known and can hold the model, healthy or not, in configuration order. Returns
        the same object while the answer is the same."""
        if fleet.topology is None or fleet.topology is not self._followed:
            self._follow(fleet)
        if profile.variants:
            key = tuple((_requirement(choice), choice.pinned_on) for choice in profile.choices)
        else:
            key = ((_requirement(profile), profile.pinned_on),)
        found = self._found.get(key)
        if found is None:
            found, before = self._find(key, profile), self._outdated.pop(key, None)
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

    def _find(self, key: _Question, profile: ModelProfile) -> tuple[str, ...]:
        holders: set[str] = set()
        for (requirement, pinned_on), choice in zip(key, profile.choices, strict=True):
            names = [name for name in pinned_on if name in self._position] if pinned_on else self._position
            found = [name for name in names if self._holds(requirement, choice, name)]
            if choice.span_nodes:
                found = sorted({*found, *self._together(choice, names)}, key=self._position.__getitem__)
            if len(key) == 1 and not pinned_on:
                return tuple(found)  # in order already
            holders.update(found)
        return tuple(sorted(holders, key=self._position.__getitem__))

    def _together(self, choice: ModelProfile, names: Iterable[str]) -> set[str]:
        """Those that can hold a part of it, where there are enough of them."""
        found: set[str] = set()
        for span in spans_of(choice):
            requirement = _requirement(span.part)
            able = {name for name in names if self._knows_groups(name) and self._holds(requirement, span.part, name)}
            if len(able) >= span.hosts:
                found |= able
        return found

    def _knows_groups(self, name: str) -> bool:
        topology = self._topologies[name]
        return topology is not None and topology.knows_groups

    def _holds(self, requirement: _Requirement, choice: ModelProfile, name: str) -> bool:
        topology = self._topologies[name]
        if topology is None:
            return False
        verdict = self._verdicts.get((requirement, topology))
        if verdict is None:
            anywhere = choice.model_copy(update={"pinned_on": ()})
            verdict = _infeasible_reason(anywhere, self._examples[topology]) is None
            self._verdicts[requirement, topology] = verdict
        return verdict


def _requirement(profile: ModelProfile) -> _Requirement:
    return _Requirement(
        profile.harness,
        profile.device_count,
        profile.combines_devices,
        profile.parallelism.tensor_only,
        profile.min_device_vram_mb,
        profile.min_compute_capability,
        profile.parallelism if profile.span_nodes else None,
        profile.span_nodes and profile.parallel is not None,
        profile.device_share_mb if profile.on_cpu else 0,
    )


def _topology(node: NodeSnapshot) -> _Topology | None:
    if node.discovery is None:
        return None
    devices = tuple(
        sorted((each.vram_total_mb, as_version(each.compute_capability), each.is_mig_instance) for each in node.devices)
    )
    return _Topology(
        frozenset(node.discovery.harnesses),
        _knows_parallel(node.discovery),
        _can_span(node),
        devices,
        None if node.ram is None else node.ram.vram_total_mb,
    )
