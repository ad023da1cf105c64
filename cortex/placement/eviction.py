"""Which models are evicted for which. Pure.

Only models with the newcomer's `residency_priority` or a lower one, and never one that is pinned to the node. Idle
models go before busy ones, busy ones before recently loaded ones; among equals the cheapest goes first, measured as the
waiting that requests would then have. When there are too many sets to compare, models are taken in order of cost per
MiB freed.

A model that is likely to be used again stays until the newcomer's requests have waited as long as its own would have to
(ski rental: rent until the rent paid reaches the price). An idle model goes sooner than a busy one of the same cost.

Between callers with different keys, those that have used less device time get the memory (`claims.advantage`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

from cortex.accounts.caller import Caller
from cortex.accounts.fairness.claims import advantage, contend, others_each
from cortex.placement.capacity import ResidentModel
from cortex.placement.inputs import PlanningView, WaitingRequests
from cortex.routing.replica import ReplicaKey

MAX_EXHAUSTIVE = 10
"""Up to this many evictable models, every subset is compared; beyond that, the cheapest are taken one at a time."""
BUSY_FACTOR = 6.0
"""The cost of evicting a model counts this many times while it has requests. It has to be drained while the newcomer
waits, and its users come back at once, so it evicts another model in turn: the two would take turns, a load each."""
PAUSE_SWAPS = 0.05
"""After its last request a model counts as in use for this fraction of the swap time, up to `pause_secs`."""
TURN_SWAPS = 0.1
"""The least residency of a model whose users deserve the memory less than the newcomer's callers, as a part of the swap
time: otherwise each of their turns would serve hardly more than a request."""
HANDOVER_SECS = 0.1
"""When to look again at a loaded model whose requests are still in the admission queue."""


class EvictionClass(IntEnum):
    """What evicting a resident disturbs, least first."""

    IDLE = 0  # serves nothing, past its minimum residency
    BUSY = 1  # past its minimum residency and serving requests: drained first
    RECENTLY_LOADED = 2  # within its minimum residency, not in use now
    RECENTLY_LOADED_BUSY = 3


@dataclass(frozen=True)
class Patience:
    """How long the callers of a newcomer leave the memory to the `users` of loaded models. `waiting` are its requests,
    `unserved_since` says since when none of theirs was served, and `load_secs` how long it loads. `ends_at` is when
    their patience ends at the latest. `cost` is how long others would wait if these models were evicted, and
    `reload_secs` how long these load again. `neighbours` use any model on their devices, `displaced` wait for what had
    to go for this one, and `spared` says that the callers take memory back from another one. Times on the view's
    clock."""

    waiting: WaitingRequests
    unserved_since: float
    users: frozenset[Caller]
    neighbours: frozenset[Caller]
    displaced: frozenset[Caller]
    spared: bool
    accounts: Mapping[str, float]
    now: float
    ends_at: float
    load_secs: float
    reload_secs: float
    cost: float

    @property
    def contended(self) -> bool:
        """Whether the models are in use by other keys than those that wait."""
        return contend(self.waiting.callers, self.users)

    @property
    def favour(self) -> int:
        """See `advantage`."""
        swap_secs = self.load_secs + self.reload_secs
        found = advantage(self.waiting.callers, self.users, self.accounts, swap_secs, self.neighbours)
        return -1 if self.spared and not found else found

    @property
    def takes_back(self) -> bool:
        """Whether the models are used by fewer keys than wait for those that had to go for them."""
        return len(self.displaced) > len(self.users)

    @property
    def until(self) -> float:
        """When the requests have waited for longer, all together, than the eviction is expected to cost beyond the load
        itself. Against other keys, all requests of one key count as one, and wait from its last turn on. If few keys
        would make many wait, each of the many waits, and that counts once more for each of them, as in the account of
        device time."""
        if favour := self.favour:
            return self.now if favour > 0 else self.ends_at
        waiting, cost = self.waiting, self.cost
        if self.takes_back:
            return self.now
        if self.contended:
            waiting = replace(waiting, count=len(waiting.callers), since=self.unserved_since)
            cost *= max(1.0, others_each(waiting.callers, self.users, self.neighbours)) ** 2
        worth = cost - self.load_secs - waiting.waited_secs(self.now)
        return min(self.ends_at, self.now + max(0.0, worth) / waiting.count)

    def together(self, others: Iterable[Patience]) -> Patience:
        """With these models too, for the same newcomer."""
        every = [self, *others]
        return replace(
            self,
            users=frozenset[Caller]().union(*(each.users for each in every)),
            neighbours=frozenset[Caller]().union(*(each.neighbours for each in every)),
            reload_secs=sum(each.reload_secs for each in every),
            displaced=frozenset[Caller]().union(*(each.displaced for each in every)),
            spared=any(each.spared for each in every),
            cost=sum(each.cost for each in every),
        )


@dataclass(frozen=True)
class Eviction:
    """A resident to evict. `ready_at` is the earliest time for it, on the view's clock. `undeserved`: its users deserve
    the memory more than the callers of the newcomer. `patience` is that of the newcomer's callers, None if they need
    not wait for the users."""

    resident: ResidentModel
    eviction_class: EvictionClass
    ready_at: float
    undeserved: bool = False
    patience: Patience | None = None


@dataclass(frozen=True)
class EvictionPlan:
    """A set of evictions carried out together."""

    evictions: tuple[Eviction, ...] = ()

    @property
    def eviction_class(self) -> EvictionClass:
        return max((eviction.eviction_class for eviction in self.evictions), default=EvictionClass.IDLE)

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
        freed = sum(each.resident.freed_mb for each in self.evictions)
        return self.cost / max(1, freed)

    @property
    def ready_at(self) -> float:
        alone = max((eviction.ready_at for eviction in self.evictions), default=-math.inf)
        return max(alone, self._patient_until)

    def waits_because(self, now: float) -> str:
        """Why it does not start yet, in words; "" when it can."""
        reasons = [_wait_reason(each, now) for each in self.evictions if each.ready_at > now]
        if not reasons and self._patient_until > now:
            reasons = [f"{len(self._patience)} models in use by other keys would go"]
        return "; ".join(reasons)

    @property
    def _patience(self) -> list[Patience]:
        found = (each.patience for each in self.evictions)
        return [each for each in found if each is not None and each.contended]

    @property
    def _patient_until(self) -> float:
        """Until when the newcomer's callers leave the memory to all users of the models together: each of these models
        alone may be theirs by now."""
        each = self._patience
        return each[0].together(each[1:]).until if len(each) > 1 else -math.inf

    @cached_property
    def order(self) -> tuple[object, ...]:
        """Sort key, smaller is better; at equal cost the least recently used models go."""
        used = max((each.resident.last_used for each in self.evictions), default=0.0)
        undeserved = any(each.undeserved for each in self.evictions)
        return undeserved, self.eviction_class, self.busy, self.cost, self.cost_per_mb, used, len(self.evictions)

    @property
    def names(self) -> tuple[ReplicaKey, ...]:
        """Tie-breaker, so that the same view always gives the same plan."""
        return tuple(sorted(each.resident.key for each in self.evictions))


NO_EVICTIONS = EvictionPlan()


def _wait_reason(eviction: Eviction, now: float) -> str:
    resident = eviction.resident
    model_id, count = resident.key.model_id, resident.in_flight
    if count:
        return f"{model_id} has {count} request{'' if count == 1 else 's'}"
    if eviction.eviction_class is EvictionClass.RECENTLY_LOADED:
        return f"{model_id} was loaded a moment ago"
    return f"{model_id} was used {max(0.0, now - resident.last_used):.0f} s ago and may be again soon"


def protection_reason(resident: ResidentModel, priority: int) -> str | None:
    """Why a newcomer with this priority may not evict the resident; None when it may."""
    if resident.protected is not None:
        return resident.protected
    if resident.priority > priority:
        return f"priority {resident.priority} is above {priority}"
    if resident.held_by_min_replicas and resident.priority == priority:
        return "kept loaded by its replicas.min"
    return None


def evictable_residents(residents: Iterable[ResidentModel], priority: int) -> list[ResidentModel]:
    """Those that a newcomer with this priority may evict; of models with a lower one it may evict every replica."""
    return [
        each if each.priority == priority else replace(each, spare_replicas=None)
        for each in residents
        if protection_reason(each, priority) is None
    ]


def assess_eviction(
    view: PlanningView,
    resident: ResidentModel,
    *,
    waiting: WaitingRequests,
    priority: int,
    load_secs: float,
    displacer: ReplicaKey | None = None,
) -> Eviction:
    """What evicting this resident takes, for a model of this priority with these waiting requests that loads in
    `load_secs`. `displacer`: see `PlanningView.displacer_of`.

    It waits until its callers' `Patience` ends, at most `patience_secs`. So a request that comes alone does not stop a
    model that many use, and many requests soon get the memory of one that few use. An idle model of a lower priority
    goes at once.

    Against users with other keys: where the newcomer's callers have an advantage they wait for requests under way, and
    for a short residency; where the users have it, for all of `patience_secs`.

    A model that was displaced takes the memory back from its displacer, rather than displace others in its turn: where
    neither has an advantage, others are spared for all of `patience_secs`, and the displacer, if fewer use it than wait
    for what it displaced, stays for a short residency.
    """
    rules, swap_secs = view.rules, load_secs + resident.reload_secs
    own_waiting = view.waiting_for(view.catalogue.running(resident.key.model_id, resident.variant))
    requested = own_waiting is not None
    users = resident.callers if own_waiting is None else resident.callers | own_waiting.callers
    patience = _patience(view, resident, users, waiting=waiting, load_secs=load_secs, displacer=displacer)
    favour, patient_until = patience.favour, patience.until
    pause = min(rules.pause_secs, PAUSE_SWAPS * swap_secs)
    profile = view.catalogue.profile(resident.key.model_id)
    own = None if profile is None else profile.min_residency_secs
    residency_ends_at = resident.loaded_at + (rules.min_residency_secs if own is None else own)
    if favour > 0 or (favour == 0 and patience.takes_back):
        residency_ends_at = min(residency_ends_at, resident.loaded_at + TURN_SWAPS * swap_secs)
    recently_loaded = view.now < residency_ends_at and not resident.asleep
    if resident.in_flight or requested:
        if not resident.in_flight:
            # Just loaded for waiting requests that have not reached it yet: evicting it would waste the load.
            patient_until = max(patient_until, view.now + HANDOVER_SECS)
        if recently_loaded:
            kind, ready_at = EvictionClass.RECENTLY_LOADED_BUSY, max(residency_ends_at, patient_until)
        else:
            kind, ready_at = EvictionClass.BUSY, patient_until
    elif recently_loaded:
        # In the gap between sequential requests, or right after its load, it does not count as idle yet.
        quiet_at = max(resident.last_used, resident.loaded_at) + pause
        kind, ready_at = EvictionClass.RECENTLY_LOADED, max(min(quiet_at, residency_ends_at), patient_until)
    elif view.now < resident.last_used + pause and not resident.asleep:
        kind, ready_at = EvictionClass.BUSY, patient_until
    else:
        kind, ready_at = EvictionClass.IDLE, patient_until
        if resident.priority < priority:
            return Eviction(resident, kind, view.now, undeserved=favour < 0)
    return Eviction(resident, kind, ready_at, undeserved=favour < 0, patience=patience)


def _patience(
    view: PlanningView,
    resident: ResidentModel,
    users: frozenset[Caller],
    *,
    waiting: WaitingRequests,
    load_secs: float,
    displacer: ReplicaKey | None,
) -> Patience:
    unserved_since, takes_back = view.unserved_since(waiting), resident.key == displacer
    return Patience(
        waiting=waiting,
        unserved_since=unserved_since,
        users=users,
        neighbours=resident.neighbours,
        displaced=view.displaced_callers(resident.key.node, resident.key) if takes_back else frozenset(),
        spared=displacer is not None and not takes_back and bool(users),
        accounts=view.accounts,
        now=view.now,
        ends_at=unserved_since + view.rules.patience_secs,
        load_secs=load_secs,
        reload_secs=resident.reload_secs,
        cost=BUSY_FACTOR * resident.cost if resident.in_flight else resident.cost,
    )


def plan_evictions_each(
    missing_mb: Iterable[Mapping[int, int]], evictable: Sequence[Eviction]
) -> Iterator[EvictionPlan | None]:
    """`plan_evictions` for several sets of devices. Sets that lack the same memory and hold the same models share one
    result; a host of equal GPUs has many such sets."""
    holders: dict[int, frozenset[int]] = {}
    found: dict[frozenset[tuple[int, frozenset[int]]], EvictionPlan | None] = {}
    for missing in missing_mb:
        for index in missing.keys() - holders.keys():
            holders[index] = frozenset(i for i, each in enumerate(evictable) if each.resident.frees_on(index))
        kind = frozenset((mb, holders[index]) for index, mb in missing.items())
        if kind not in found:
            found[kind] = plan_evictions(missing, evictable)
        yield found[kind]


def free_enough(missing_mb: Mapping[int, int], evictions: Iterable[Eviction]) -> bool:
    """Whether these evictions free what is missing on every device."""
    left = dict(missing_mb)
    for each in evictions:
        for index in left:
            left[index] -= each.resident.frees_on(index)
    return all(mb <= 0 for mb in left.values())


def plan_evictions(missing_mb: Mapping[int, int], evictable: Sequence[Eviction]) -> EvictionPlan | None:
    """The best set that frees what is missing on every device; None when even all of them together do not."""
    holders = [each for each in evictable if any(map(each.resident.frees_on, missing_mb))]
    if not free_enough(missing_mb, holders):
        return None
    if len(holders) == 1:  # the usual case: there is nothing to compare
        return EvictionPlan(tuple(holders)) if _within_minimums(holders) else None
    if len(holders) <= MAX_EXHAUSTIVE:
        plans = (EvictionPlan(chosen) for chosen in _minimal(missing_mb, holders))
        return min(plans, key=lambda plan: (plan.order, plan.names), default=None)
    cheapest = _cheapest_first(missing_mb, holders)
    return None if cheapest is None else EvictionPlan(cheapest)


def _minimal(missing_mb: Mapping[int, int], evictable: Sequence[Eviction]) -> Iterator[tuple[Eviction, ...]]:
    """Every sufficient set from which no eviction can be dropped."""
    sufficient: list[int] = []
    for bits in sorted(range(1, 1 << len(evictable)), key=int.bit_count):
        if any(bits & smaller == smaller for smaller in sufficient):
            continue
        chosen = tuple(each for position, each in enumerate(evictable) if bits >> position & 1)
        if free_enough(missing_mb, chosen) and len(_within_minimums(chosen)) == len(chosen):
            sufficient.append(bits)
            yield chosen


def _within_minimums(evictions: Sequence[Eviction]) -> list[Eviction]:
    """The first of them that may be evicted together: each model keeps its `replicas.min`."""
    gone: Counter[str] = Counter()
    kept: list[Eviction] = []
    for each in evictions:
        model_id, spare = each.resident.key.model_id, each.resident.spare_replicas
        if spare is None or gone[model_id] < spare:
            gone[model_id] += 1
            kept.append(each)
    return kept


def _cheapest_first(missing_mb: Mapping[int, int], evictable: Sequence[Eviction]) -> tuple[Eviction, ...] | None:
    alone = [(each, EvictionPlan((each,))) for each in evictable]
    alone.sort(key=lambda pair: (pair[1].eviction_class, pair[1].cost_per_mb, pair[1].order, pair[1].names))
    together = _within_minimums([each for each, _ in alone])
    return first_sufficient(missing_mb, together) if free_enough(missing_mb, together) else None


def first_sufficient(missing_mb: Mapping[int, int], ordered: Iterable[Eviction]) -> tuple[Eviction, ...]:
    """The first evictions in this order that free what is missing on every device, without those that the later ones
    make unnecessary. All of them together must be enough."""
    chosen: list[Eviction] = []
    for each in ordered:
        chosen.append(each)
        if free_enough(missing_mb, chosen):
            break
    for each in reversed(list(chosen)):  # the last first: keep a model if evicting the others is enough
        rest = [other for other in chosen if other is not each]
        if free_enough(missing_mb, rest):
            chosen = rest
    return tuple(chosen)
