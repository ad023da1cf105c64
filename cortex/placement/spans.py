"""How a model can be spread over several hosts, and which hosts are well connected. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from cortex.config.neurons import HostNetwork
from cortex.config.profile import ModelProfile
from cortex.placement.load_plan import LoadPlan
from shared.protocol import Parallelism
from shared.protocol.group import split_over


@dataclass(frozen=True)
class Span:
    """One model over `hosts` hosts: `whole` says how it is split, `part` is what each host holds, as a model of its
    own."""

    hosts: int
    whole: Parallelism
    part: ModelProfile

    @property
    def crosses_tensor_groups(self) -> bool:
        """Whether the devices of one tensor group are on several hosts, which exchange data for every layer."""
        return self.whole.tensor > self.part.parallelism.tensor


def spans_of(profile: ModelProfile) -> list[Span]:
    """The ways to spread a model with `span_nodes`, best first: tensor groups within a host, then fewer hosts. A model
    that only says `min_devices` gets a pipeline across hosts; one with `parallel` is split as that says."""
    return sorted(_spans(profile), key=lambda span: (span.crosses_tensor_groups, span.hosts))


def _spans(profile: ModelProfile) -> Iterator[Span]:
    if not profile.span_nodes:
        return
    for hosts in range(2, profile.device_count + 1):
        whole = profile.parallel or _pipeline_across(profile.device_count, hosts)
        if whole is None:
            continue
        try:
            local = split_over(whole, hosts)
        except ValueError:
            continue
        yield Span(hosts, whole, profile.part(local))


def _pipeline_across(devices: int, hosts: int) -> Parallelism | None:
    return None if devices % hosts else Parallelism(tensor=devices // hosts, pipeline=hosts)


@dataclass(frozen=True)
class NetworkBetween:
    """What connects the hosts of a group: the networks that they are in, and the speed of the slowest link in Gbit/s,
    None if one is unknown. Between two networks no speed is known."""

    names: tuple[str | None, ...]
    gbps: float | None

    @property
    def rank(self) -> tuple[int, float, bool]:
        """Smaller is better: one network before several, then the faster one, then one with a name. An unknown speed is
        the slowest."""
        return len(self.names), -(self.gbps or 0.0), self.names[0] is None

    def __str__(self) -> str:
        """Such as "network rack1, 100 Gbit/s"; empty if nothing is known."""
        shown = ["no network" if name is None else name for name in self.names]
        if len(shown) > 1:
            return f"between {' and '.join(shown)}, speed unknown"
        name = [] if self.names[0] is None else [f"network {self.names[0]}"]
        return ", ".join([*name, *([] if self.gbps is None else [f"{self.gbps:g} Gbit/s"])])


def network_between(networks: Iterable[HostNetwork]) -> NetworkBetween:
    """What connects these hosts."""
    listed = list(networks)
    names = tuple(dict.fromkeys(each.name for each in listed))
    speeds = [each.gbps for each in listed if each.gbps is not None]
    return NetworkBetween(names, min(speeds) if len(names) == 1 and len(speeds) == len(listed) else None)


def well_connected(
    parts: Iterable[LoadPlan], hosts: int, network_of: Callable[[str], HostNetwork]
) -> Iterator[list[LoadPlan]]:
    """From the plans on single nodes, for each network the best `hosts` of those with the fastest links. If no network
    has enough nodes, those of as few networks as possible, with the nodes of one network in a row."""
    pools: dict[str | None, list[LoadPlan]] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        pools.setdefault(network_of(part.node).name, []).append(part)
    enough = [pool for pool in pools.values() if len(pool) >= hosts]
    for pool in enough:
        speed = {part.node: network_of(part.node).gbps or 0.0 for part in pool}
        slowest = sorted(speed.values(), reverse=True)[hosts - 1]
        yield [part for part in pool if speed[part.node] >= slowest][:hosts]
    if not enough:
        largest_first = sorted(pools.values(), key=lambda pool: -len(pool))
        mixed = list(chain.from_iterable(largest_first))[:hosts]
        if len(mixed) == hosts:
            yield mixed
