"""Everything that a plan is made from, as it is at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cortex.config.catalogue import DEFAULT_PRIORITY, Catalogue, ModelProfile
from cortex.config.settings import Rules
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from shared.protocol import ModelStatus

Key = tuple[str, str]
"""(model id, node name)."""


@dataclass(frozen=True)
class Use:
    """How a loaded model is used on one node. Times are those of `View.now`.

    `in_flight` are our own requests there. `last_used` and `loaded_at` are 0 when nothing is known.
    """

    in_flight: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0


UNUSED = Use()
DEFAULT_RULES = Rules()


@dataclass(frozen=True)
class Waiting:
    """Requests that wait for a model: how many, and since when the first of them."""

    count: int
    since: float


@dataclass(frozen=True)
class Backoff:
    """A model is not to be loaded on a node until then, because it failed there. `passes`: who waits need not be told,
    since the cause goes by itself."""

    until: float
    reason: str
    passes: bool = False


ANY_NODE = "*"
"""In a key of `View.bars`: the model is to be loaded nowhere. No neuron has this name."""


@dataclass(frozen=True)
class View:
    """One moment. `now` is in seconds of any clock that all times here share.

    `demand` is in requests a minute, of late; `load_secs` what loads took, by model and node; `needs_mb` what neurons
    were seen to book on each device for models whose catalogue entry does not say; `pressed` since when a model's
    replicas have had more to do than `Rules.replica_target` each.
    """

    now: float
    catalogue: Catalogue
    fleet: FleetSnapshot
    rules: Rules = DEFAULT_RULES
    uses: Mapping[Key, Use] = field(default_factory=dict)
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    demand: Mapping[str, float] = field(default_factory=dict)
    load_secs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    needs_mb: Mapping[str, int] = field(default_factory=dict)
    bars: Mapping[Key, Backoff] = field(default_factory=dict)
    pressed: Mapping[str, float] = field(default_factory=dict)

    def use(self, model_id: str, node: str) -> Use:
        return self.uses.get((model_id, node), UNUSED)

    def working(self, model_id: str, node: NodeSnapshot) -> int:
        """Requests that the model's engine on the node has, for whomever: by our own count, or the node's."""
        return max(self.use(model_id, node.name).in_flight, node.working_on(model_id))

    def bar(self, model_id: str, node: str) -> Backoff | None:
        """What forbids a load there now."""
        for key in ((model_id, ANY_NODE), (model_id, node)):
            bar = self.bars.get(key)
            if bar is not None and bar.until > self.now:
                return bar
        return None

    def share_mb(self, profile: ModelProfile) -> int:
        """MiB that each device must give: what the catalogue says, else what was seen, else 0."""
        return profile.device_share_mb or self.needs_mb.get(profile.id, 0)

    def expected_load_secs(self, model_id: str, node: str) -> float | None:
        """What a load there took, else the longest that one took elsewhere; None when nobody ever loaded it."""
        known = self.load_secs.get(model_id)
        return known.get(node, max(known.values())) if known else None

    def profile(self, model_id: str) -> ModelProfile | None:
        """The catalogue's word on a model, else what can be told of one that only neurons know: it goes where it was.
        None when it is nowhere in a state from which it can be loaded."""
        profile = self.catalogue.profile(model_id)
        if profile is not None:
            return profile
        known = [
            node
            for node in self.fleet.holders(model_id)
            if node.status_of(model_id) in (ModelStatus.UNLOADED, ModelStatus.SLEEPING)
            or (model_id, node.name) in self.fleet.leaving
        ]
        return self.remembered(model_id, known)

    def remembered(self, model_id: str, nodes: Sequence[NodeSnapshot]) -> ModelProfile | None:
        """What can be told of a model by the nodes that list it, to load it again on one of them; None without any."""
        if not nodes:
            return None
        entry = nodes[0].models[model_id]
        # Not validated: neurons name their models as they like, also as no catalogue may.
        return ModelProfile.model_construct(
            id=model_id,
            harness=entry.harness or "vllm",
            min_devices=max(1, len(entry.devices)),
            pinned_on=tuple(node.name for node in nodes),
            residency_priority=self.priority(model_id),
        )

    def priority(self, model_id: str) -> int:
        """The residency priority of a model; that of a catalogue entry which says nothing, for one that is in none."""
        profile = self.catalogue.profile(model_id)
        return DEFAULT_PRIORITY if profile is None else profile.residency_priority
