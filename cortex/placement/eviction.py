"""Which models are evicted for which. Pure.

Only models with the newcomer's `residency_priority` or a lower one, and never one pinned to the node. Idle models go
before busy ones, busy ones before recently loaded ones; among equals the cheapest goes first, measured as reload
seconds times recent demand. When there are too many sets to compare, models are taken in order of cost per MiB freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from cortex.placement.capacity import Resident
from cortex.placement.inputs import Key, View

_EXHAUSTIVE = 10
"""Up to this many residents, every subset is compared; beyond that, the cheapest are taken one at a time."""


PATIENCE_EXCHANGES = 4.0
"""A model in use is left alone for this multiple of the time to swap it out and back in, up to `patience_secs`."""
PAUSE_EXCHANGES = 0.1
LEAST_PAUSE_SECS = 0.5
"""After its last request a model counts as in use for this fraction of the swap time, up to `pause_secs`."""
HANDOVER_SECS = 0.1
"""When to look again at a loaded model whose requests are still in the waiting room."""


class Claim(IntEnum):
    """How strong a resident's claim to stay is, weakest first."""

    IDLE = 0
    BUSY = 1  # past its minimum residency and serving requests: drained first
    YOUNG = 2  # within its minimum residency, not in use now
    YOUNG_BUSY = 3


@dataclass(frozen=True)
class Eviction:
    """A resident to evict. `ready_at` is when it may be asked to leave, on the view's clock."""

    resident: Resident
    claim: Claim
    ready_at: float


@dataclass(frozen=True)
class Displacement:
    """A set of evictions carried out together."""

    evictions: tuple[Eviction, ...] = ()

    @property
    def claim(self) -> Claim:
        return max((eviction.claim for eviction in self.evictions), default=Claim.IDLE)

    @property
    def busy(self) -> int:
        """How many have requests to finish first."""
        return sum(eviction.resident.in_flight > 0 for eviction in self.evictions)

    @property
    def cost(self) -> float:
        """Total cost; freeing more than needed does not lower it."""
        return sum(each.resident.cost for each in self.evictions)

    @property
    def cost_per_mb(self) -> float:
        freed = sum(each.resident.frees_mb * len(each.resident.devices) for each in self.evictions)
        return self.cost / max(1, freed)

    @property
    def ready_at(self) -> float:
        return max((eviction.ready_at for eviction in self.evictions), default=float("-inf"))

    @property
    def order(self) -> tuple[object, ...]:
        """Sort key, smaller is better; at equal cost the least recently used models go."""
        used = max((each.resident.last_used for each in self.evictions), default=0.0)
        return self.claim, self.busy, self.cost, self.cost_per_mb, used, len(self.evictions)

    @property
    def names(self) -> tuple[Key, ...]:
        """Tie-breaker, so that the same view always gives the same plan."""
        return tuple(sorted(each.resident.key for each in self.evictions))


NO_EVICTIONS = Displacement()


def shield(resident: Resident, priority: int) -> str | None:
    """Why a newcomer with this priority may not evict the resident; None when it may."""
    if resident.protected is not None:
        return resident.protected
    if resident.priority > priority:
        return f"priority {resident.priority} is above {priority}"
    if resident.kept and resident.priority == priority:
        return "kept loaded by its replicas.min"
    return None


def eviction(view: View, resident: Resident, *, since: float, load_secs: float) -> Eviction:
    """What evicting this resident takes, for a model that has waited since `since` and loads in `load_secs`.

    The longer swapping out and back in takes, the longer a model in use is left alone, so that most of the time is
    spent on answers rather than loads.
    """
    rules, exchange_secs = view.rules, load_secs + resident.reload_secs
    patient_until = since + min(rules.patience_secs, PATIENCE_EXCHANGES * exchange_secs)
    pause = min(rules.pause_secs, max(LEAST_PAUSE_SECS, PAUSE_EXCHANGES * exchange_secs))
    profile = view.catalogue.profile(resident.key[0])
    own = None if profile is None else profile.min_residency_secs
    had_its_time_at = resident.loaded_at + (rules.min_residency_secs if own is None else own)
    young = view.now < had_its_time_at and not resident.asleep
    wanted = resident.key[0] in view.waiting
    if resident.in_flight or wanted:
        if wanted:  # just loaded for waiting requests that have not reached it yet; evicting it would waste the load
            patient_until = max(patient_until, view.now + HANDOVER_SECS)
        if young:
            return Eviction(resident, Claim.YOUNG_BUSY, max(had_its_time_at, patient_until))
        return Eviction(resident, Claim.BUSY, patient_until)
    if young:
        # In the gap between sequential requests, or right after its load, it does not count as idle yet.
        quiet_at = max(resident.last_used, resident.loaded_at) + pause
        return Eviction(resident, Claim.YOUNG, min(quiet_at, had_its_time_at))
    gap_at = resident.last_used + pause
    if view.now < gap_at and not resident.asleep:  # after a long enough wait, it may be evicted between requests
        return Eviction(resident, Claim.BUSY, min(gap_at, since + 2 * pause))
    return Eviction(resident, Claim.IDLE, view.now)


def displace_each(
    missing_mb: Iterable[Mapping[int, int]], candidates: Sequence[Eviction]
) -> Iterator[Displacement | None]:
    """`displace` for several sets of devices. Sets that lack the same memory and hold the same models share one
    result; a host of equal GPUs has many such sets."""
    holders: dict[int, frozenset[int]] = {}
    found: dict[frozenset[tuple[int, frozenset[int]]], Displacement | None] = {}
    for missing in missing_mb:
        for index in missing.keys() - holders.keys():
            holders[index] = frozenset(i for i, each in enumerate(candidates) if index in each.resident.devices)
        kind = frozenset((mb, holders[index]) for index, mb in missing.items())
        if kind not in found:
            found[kind] = displace(missing, candidates)
        yield found[kind]


def suffice(missing_mb: Mapping[int, int], evictions: Iterable[Eviction]) -> bool:
    """Whether these evictions free what is missing on every device."""
    left = dict(missing_mb)
    for each in evictions:
        for index in each.resident.devices:
            if index in left:
                left[index] -= each.resident.frees_mb
    return all(mb <= 0 for mb in left.values())


def displace(missing_mb: Mapping[int, int], candidates: Sequence[Eviction]) -> Displacement | None:
    """The best set that frees what is missing on every device; None when even all of them together do not."""
    concerned = [each for each in candidates if each.resident.devices & missing_mb.keys()]
    if not suffice(missing_mb, concerned):
        return None
    if len(concerned) <= _EXHAUSTIVE:
        return min(
            (Displacement(chosen) for chosen in _minimal(missing_mb, concerned)), key=lambda d: (d.order, d.names)
        )
    return Displacement(_cheapest_first(missing_mb, concerned))


def _minimal(missing_mb: Mapping[int, int], candidates: Sequence[Eviction]) -> Iterator[tuple[Eviction, ...]]:
    """Every sufficient set from which no eviction can be dropped."""
    sufficient: list[int] = []
    for bits in sorted(range(1, 1 << len(candidates)), key=int.bit_count):
        if any(bits & smaller == smaller for smaller in sufficient):
            continue
        chosen = tuple(each for position, each in enumerate(candidates) if bits >> position & 1)
        if suffice(missing_mb, chosen):
            sufficient.append(bits)
            yield chosen


def _cheapest_first(missing_mb: Mapping[int, int], candidates: Sequence[Eviction]) -> tuple[Eviction, ...]:
    alone = [(each, Displacement((each,))) for each in candidates]
    alone.sort(key=lambda pair: (pair[1].claim, pair[1].cost_per_mb, pair[1].order, pair[1].names))
    ordered = [each for each, _ in alone]
    chosen: list[Eviction] = []
    for each in ordered:
        chosen.append(each)
        if suffice(missing_mb, chosen):
            break
    for each in reversed(list(chosen)):  # most expensive first: it may no longer be needed
        rest = [other for other in chosen if other is not each]
        if suffice(missing_mb, rest):
            chosen = rest
    return tuple(chosen)
