"""Engines that span several neurons, as the neurons list their parts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot


@dataclass(frozen=True)
class EngineGroup:
    """The listed parts of one engine, by rank. `size` is how many there should be."""

    id: str
    model_id: str
    size: int
    parts: Mapping[int, EngineSnapshot]

    @property
    def leader(self) -> EngineSnapshot | None:
        """The part that takes the requests."""
        return self.parts.get(0)

    @property
    def complete(self) -> bool:
        """Whether every part has loaded or is loading."""
        return len(self.parts) == self.size and all(_runs(part) for part in self.parts.values())

    @property
    def running(self) -> list[EngineSnapshot]:
        """The parts whose processes run, as far as known, rank 0 first."""
        return [self.parts[rank] for rank in sorted(self.parts) if _runs(self.parts[rank])]

    @property
    def reachable(self) -> list[EngineSnapshot]:
        """The running parts on healthy neurons, rank 0 first."""
        return [part for part in self.running if part.node.healthy]

    @property
    def lacks_parts(self) -> bool:
        """Whether a part is missing, has ended or is out of reach, and others are left that can be unloaded. What runs
        on a neuron that is down has to wait until that is back."""
        return bool(self.reachable) and not (self.complete and len(self.reachable) == self.size)

    def lost_part(self) -> str | None:
        """Which part has ended or cannot be reached, in words; None if none is known to. A part that is not listed may
        not have begun yet, unless rank 0 serves already."""
        for rank, part in sorted(self.parts.items()):
            if not part.node.healthy:
                return f"part {rank} is on {part.node.name}, which is down"
            if not _runs(part):
                return f"part {rank} on {part.node.name} has ended{': ' + part.view.error if part.view.error else ''}"
        leader = self.leader
        if leader is not None and leader.view.loaded and len(self.parts) < self.size:
            return self.missing_parts()
        return None

    def missing_parts(self) -> str:
        """The parts that no neuron lists, in words."""
        missing = [str(rank) for rank in range(self.size) if rank not in self.parts]
        return f"part{'' if len(missing) == 1 else 's'} {', '.join(missing)} of {self.size}: no neuron has it"


def groups_of(fleet: FleetSnapshot, model_ids: Iterable[str]) -> list[EngineGroup]:
    """The groups that run these models."""
    found: dict[tuple[str, str], dict[int, EngineSnapshot]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for model_id in model_ids:
        for engine in fleet.engines(model_id):
            part = engine.view.group
            if part is not None:
                found.setdefault((model_id, part.id), {})[part.rank] = engine
                sizes[model_id, part.id] = part.size
    return [EngineGroup(group, model, sizes[model, group], parts) for (model, group), parts in found.items()]


def group_with(fleet: FleetSnapshot, engine: EngineSnapshot) -> EngineGroup | None:
    """The group that the engine is a part of, if it is one."""
    part = engine.view.group
    if part is None:
        return None
    return next((each for each in groups_of(fleet, [engine.view.id]) if each.id == part.id), None)


def serving_engine(fleet: FleetSnapshot, engine: EngineSnapshot) -> EngineSnapshot:
    """The engine that takes the requests for this one: another part, for a part of a group without a server."""
    if engine.view.group is None or engine.view.group.serves:
        return engine
    group = group_with(fleet, engine)
    return engine if group is None or group.leader is None else group.leader


def sick_because(fleet: FleetSnapshot, engine: EngineSnapshot) -> str | None:
    """As `EngineSnapshot.sick_because`, for all parts of an engine that spans several neurons."""
    group = group_with(fleet, engine)
    parts = [engine] if group is None else group.running
    return next((why for part in parts if (why := part.sick_because) is not None), None)


def _runs(part: EngineSnapshot) -> bool:
    return part.view.loaded or part.view.coming or part.view.drains
