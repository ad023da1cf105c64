"""Who gets the energy that a GPU used between two samples. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neuron.spec import InstanceKey
from shared.protocol import Device, DeviceHealth

LONGEST_GAP_SECS = 30.0
"""Between two samples of the power. What a GPU without a counter uses in a longer gap, in which neuron was stopped or
the GPU did not answer, is unknown and not counted."""
JOULES_PER_WH = 3600.0


@dataclass(frozen=True)
class Resident:
    """An instance that has memory on `devices`. `requests`: those that run there now; None: unknown. `marks` change
    with every request."""

    key: InstanceKey
    devices: tuple[int, ...]
    requests: int | None = 0
    marks: tuple[float, ...] = ()


@dataclass(frozen=True)
class PowerSample:
    """A GPU at `at`, monotonic seconds. `counter_wh`: what it has used since its driver was loaded. None: unknown."""

    at: float
    power_w: float | None
    counter_wh: float | None


class EnergyClaim(NamedTuple):
    """One instance on one GPU. `size`: the part of the GPU that it has. `activity`: its part in what the GPU uses for
    requests. Only the ratio between instances counts."""

    key: InstanceKey
    size: float
    activity: float


class Portion(NamedTuple):
    """Wh of one instance: for its requests, and of the draw of an idle GPU."""

    active_wh: float
    resident_wh: float


def used_wh(before: PowerSample, now: PowerSample) -> float:
    """What a GPU used between two samples: the difference of its counter, or the area below the line between the two
    powers."""
    if before.counter_wh is not None and now.counter_wh is not None and now.counter_wh >= before.counter_wh:
        return now.counter_wh - before.counter_wh
    secs = now.at - before.at
    if before.power_w is None or now.power_w is None or not 0 < secs <= LONGEST_GAP_SECS:
        return 0.0
    return max(0.0, before.power_w + now.power_w) / 2 * secs / JOULES_PER_WH


def portions(wh: float, idle_wh: float, claims: Sequence[EnergyClaim]) -> dict[InstanceKey, Portion]:
    """Shares `wh` among the instances: `idle_wh` of it, or all if none of them is active, by size, and the rest by
    activity. The sum is `wh`, unless there is no instance."""
    size = sum(claim.size for claim in claims)
    activity = sum(claim.activity for claim in claims)
    idle = min(wh, idle_wh) if activity else wh
    return {
        claim.key: Portion(
            (wh - idle) * claim.activity / activity if activity else 0.0,
            idle * claim.size / size,
        )
        for claim in claims
    }


def claims_on(
    gpu: Device,
    devices: Sequence[Device],
    health: Mapping[int, DeviceHealth],
    residents: Sequence[Resident],
    busy: Mapping[InstanceKey, bool],
) -> list[EnergyClaim]:
    """The instances on a GPU or on its MIG instances. `busy` says which of them had a request since the last sample.

    An instance is as active as it has requests. If they are unknown, it counts as one while the GPU computes. On a MIG
    instance its size limits what an engine can use, so there the number of requests does not count.
    """
    slices = {each.index: each.vram_total_mb for each in devices if each.parent == gpu.index}
    total = sum(slices.values())
    found = []
    for resident in residents:
        here = [index for index in resident.devices if index == gpu.index or index in slices]
        if not here:
            continue
        requests = resident.requests
        if requests is None:
            utilization = [live.utilization_pct for index in here if (live := health.get(index)) is not None]
            requests = 1 if any(each is None or each > 0 for each in utilization) else 0
        requests = max(requests, int(busy.get(resident.key, False)))
        if gpu.index in here or not total:
            found.append(EnergyClaim(resident.key, 1.0, float(requests)))
        else:
            size = sum(slices[index] for index in here) / total
            found.append(EnergyClaim(resident.key, size, size * min(1, requests)))
    return found
