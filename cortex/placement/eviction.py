"""Who makes way for whom. Pure.

Only models of equal or lower `residency_priority` than the newcomer; none that is pinned to the node; the idle before
the busy, the busy before those that have just been loaded; among equals the cheapest, which is measured reload seconds
times recent demand. Where sets are too many to compare, those go first that are the cheapest per MiB freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from cortex.placement.capacity import Resident
from cortex.placement.inputs import Key, View

_EXHAUSTIVE = 10
"""Residents whose every subset is looked at; of more the cheapest are taken one after the other."""


PATIENCE_EXCHANGES = 4.0
"""A model in use is left alone for so many times what its exchange for another and back takes, but for `patience_secs`
at most."""
PAUSE_EXCHANGES = 0.1
LEAST_PAUSE_SECS = 0.5
"""It counts as in use for this part of what the exchange takes after its last request, but for `pause_secs` at most."""
HANDOVER_SECS = 0.1
"""When to look again at a loaded model whose requests have not left the waiting room yet."""


class Claim(IntEnum):
    """What a resident can say for itself, weakest first."""

    IDLE = 0
    BUSY = 1  # it had its time, and has requests: it is drained first
    YOUNG = 2  # it has not had its time, and nobody uses it now
    YOUNG_BUSY = 3


@dataclass(frozen=True)
class Eviction:
    """A resident that makes way. `ready_at` is when it may be asked to go, in the view's time."""

    resident: Resident
    claim: Claim
    ready_at: float


@dataclass(frozen=True)
class Displacement:
    """Those that make way together."""

    evictions: tuple[Eviction, ...] = ()

    @property
    def claim(self) -> Claim:
        return max((eviction.claim for eviction in self.evictions), default=Claim.IDLE)

    @property
    def busy(self) -> int:
        """How many have requests, and must finish them first."""
        return sum(eviction.resident.in_flight > 0 for eviction in self.evictions)

    @property
    def cost(self) -> float:
        """Of all together: no less for freeing more than is missing."""
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
        """The better the smaller; of those that cost the same, what was used least recently goes."""
        used = max((each.resident.last_used for each in self.evictions), default=0.0)
        return self.claim, self.busy, self.cost, self.cost_per_mb, used, len(self.evictions)

    @property
    def names(self) -> tuple[Key, ...]:
        """What decides between equals, so that the same moment always gives the same plan."""
        return tuple(sorted(each.resident.key for each in self.evictions))


NOBODY = Displacement()


def shield(resident: Resident, priority: int) -> str | None:
    """Why a resident does not make way for a newcomer of this priority, None when it does."""
    if resident.protected is not None:
        return resident.protected
    if resident.priority > priority:
        return f"priority {resident.priority} is above {priority}"
    if resident.kept and resident.priority == priority:
        return "kept loaded by its replicas.min"
    return None


def eviction(view: View, resident: Resident, *, since: float, load_secs: float) -> Eviction:
    """What displacing this resident would take, for somebody who waits since then and whose load takes so long.

    The longer the exchange takes, there and back, the longer the one that is in use is left alone: so that most of the
    time goes into answers and not into loads.
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
        if wanted:  # it has just come up for them, and they are on their way to it: else it would have come in vain
            patient_until = max(patient_until, view.now + HANDOVER_SECS)
        if young:
            return Eviction(resident, Claim.YOUNG_BUSY, max(had_its_time_at, patient_until))
        return Eviction(resident, Claim.BUSY, patient_until)
    if young:
        # Between two requests of somebody who asks one after the other it is not idle yet, nor right after its load.
        quiet_at = max(resident.last_used, resident.loaded_at) + pause
        return Eviction(resident, Claim.YOUNG, min(quiet_at, had_its_time_at))
    gap_at = resident.last_used + pause
    if view.now < gap_at and not resident.asleep:  # whoever has waited for long enough takes it between two requests
        return Eviction(resident, Claim.BUSY, min(gap_at, since + 2 * pause))
    return Eviction(resident, Claim.IDLE, view.now)


def displace_each(
    missing_mb: Iterable[Mapping[int, int]], candidates: Sequence[Eviction]
) -> Iterator[Displacement | None]:
    """`displace` for several sets of devices. Devices that lack the same, and are held by the same, are alike: what is
    found for one such set is good for all, of which a host of equal GPUs has many."""
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
    """Whether their leaving makes room for what is missing on each device."""
    left = dict(missing_mb)
    for each in evictions:
        for index in each.resident.devices:
            if index in left:
                left[index] -= each.resident.frees_mb
    return all(mb <= 0 for mb in left.values())


def displace(missing_mb: Mapping[int, int], candidates: Sequence[Eviction]) -> Displacement | None:
    """The best of those that make room for what is missing on each device; None when all together do not."""
    concerned = [each for each in candidates if each.resident.devices & missing_mb.keys()]
    if not suffice(missing_mb, concerned):
        return None
    if len(concerned) <= _EXHAUSTIVE:
        return min(
            (Displacement(chosen) for chosen in _minimal(missing_mb, concerned)), key=lambda d: (d.order, d.names)
        )
    return Displacement(_cheapest_first(missing_mb, concerned))


def _minimal(missing_mb: Mapping[int, int], candidates: Sequence[Eviction]) -> Iterator[tuple[Eviction, ...]]:
    """Every set that suffices and has nobody in it without whom it would, too."""
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
    for each in reversed(list(chosen)):  # the dearest first: perhaps it is not needed any more
        rest = [other for other in chosen if other is not each]
        if suffice(missing_mb, rest):
            chosen = rest
    return tuple(chosen)
