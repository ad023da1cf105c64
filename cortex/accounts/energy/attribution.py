"""For which requests an engine used its energy. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

HOUR_SECS: Final = 3600.0
PROMPT_TOKEN_WORK: Final = 0.2
"""The energy of a token of a prompt that is not in the cache, in tokens of an answer. Many are computed at once."""

EnergyKind: TypeAlias = Literal["request", "resident", "idle"]
"""request: for a request of a key. resident: an engine that has no request. idle: a device without an engine."""


@dataclass(frozen=True)
class InstanceCount:
    """What an instance has used of one device, in Wh since the neuron's epoch began; see
    `shared.protocol.InstanceEnergy`."""

    device: str
    model: str
    instance: str
    active_wh: float
    resident_wh: float


@dataclass(frozen=True)
class MeterReading:
    """The counts of one neuron at `at`, seconds since 1970. `devices`: Wh by device since `epoch` began."""

    node: str
    epoch: str
    at: float
    devices: dict[str, float]
    instances: tuple[InstanceCount, ...]


class EnergySlice(NamedTuple):
    """What an instance used of one device between two readings, in Wh; times in seconds since 1970."""

    node: str
    device: str
    model: str
    instance: str
    started_at: float
    ended_at: float
    active_wh: float
    resident_wh: float

    @property
    def wh(self) -> float:
        return self.active_wh + self.resident_wh


class ServedRequest(NamedTuple):
    """A request that had an engine from `started_at` to `ended_at`. `work`: the energy that it needs, in tokens of an
    answer; None: unknown."""

    request_id: str
    ended_at: float
    started_at: float
    key_id: str
    model: str
    work: float | None


class EnergyShare(NamedTuple):
    """Part of a slice. `request`: for which one; None: for none."""

    wh: float
    request: ServedRequest | None


def work_of(prompt: int | None, cached: int | None, completion: int | None) -> float | None:
    """The work of a request by its tokens; None if they are unknown, or none."""
    if prompt is None and completion is None:
        return None
    return ((prompt or 0) - (cached or 0)) * PROMPT_TOKEN_WORK + (completion or 0) or None


def hour_of(at: float) -> float:
    """The first second of the hour."""
    return at // HOUR_SECS * HOUR_SECS


def parts_by_hour(started_at: float, ended_at: float) -> Iterator[tuple[float, float, float]]:
    """The parts of a time that lie in one hour each: start, end, and the part of the whole that it is."""
    if ended_at <= started_at:
        yield started_at, ended_at, 1.0
        return
    start = started_at
    while start < ended_at:
        end = min(ended_at, hour_of(start) + HOUR_SECS)
        yield start, end, (end - start) / (ended_at - started_at)
        start = end


def shares(energy: EnergySlice, requests: Sequence[ServedRequest]) -> list[EnergyShare]:
    """Shares a slice among the requests that its instance served. The sum is the slice's energy.

    The requests get what was used for requests, and of the idle draw the part of the time in which one of them ran.
    Among them each counts with the time that it ran within the slice, times its work per second, if that is known of
    all of them. The rest is for no request.
    """
    present = [
        (each, overlap)
        for each in requests
        if (overlap := min(each.ended_at, energy.ended_at) - max(each.started_at, energy.started_at)) > 0
    ]
    if not present:
        return [EnergyShare(energy.wh, None)]
    busy = _covered(energy, [each for each, _ in present]) / (energy.ended_at - energy.started_at)
    rest = energy.resident_wh * (1 - busy)
    used = energy.wh - rest
    by_work = all(each.work is not None for each, _ in present)
    weights = [overlap * (_rate(each) if by_work else 1.0) for each, overlap in present]
    total = sum(weights)
    found = [EnergyShare(used * weight / total, each) for (each, _), weight in zip(present, weights, strict=True)]
    return [*found, EnergyShare(rest, None)] if rest > 0 else found


def _rate(request: ServedRequest) -> float:
    """Work per second."""
    return (request.work or 0.0) / (request.ended_at - request.started_at)


def _covered(energy: EnergySlice, requests: Sequence[ServedRequest]) -> float:
    """The seconds of the slice in which at least one of the requests ran."""
    covered, until = 0.0, energy.started_at
    for each in sorted(requests, key=lambda request: request.started_at):
        start, end = max(each.started_at, until), min(each.ended_at, energy.ended_at)
        if end > start:
            covered += end - start
            until = end
    return covered
