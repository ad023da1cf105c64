"""How a model can be spread over several hosts. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cortex.config.catalogue import ModelProfile
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
