"""Which models are evicted for which, and when, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cortex.accounts.caller import Caller
from cortex.config.profile import ModelProfile
from cortex.config.settings import Rules
from cortex.fleet.snapshot import FleetSnapshot
from cortex.placement.capacity import ResidentModel
from cortex.placement.eviction import Eviction, EvictionClass, EvictionPlan, free_enough, plan_evictions
from cortex.placement.inputs import Arrivals, ReplicaUsage, WaitingRequests
from cortex.placement.load_plan import Fit
from tests.cortex.fleets import On, fleet, host, replica_key
from tests.cortex.views import NOW, RULES, asked, evicted, plan_for, planned, profile, used, view

M = profile(vram_mb=20000)
BOX = fleet(host("box", 24000, models={"a": On(20000)}))


@pytest.mark.parametrize(
    ("fields", "evicts"),
    [
        ({}, True),  # equals can be evicted
        ({"residency_priority": 50}, True),
        ({"residency_priority": 101}, False),
        ({"pinned_on": ["box"]}, False),
        ({"pinned_on": ["box"], "residency_priority": 1}, False),  # pinned there, whatever its priority
        ({"pinned_on": ["other"], "residency_priority": 1}, True),
        ({"replicas": {"min": 1}}, False),
        ({"replicas": {"min": 1}, "residency_priority": 50}, True),  # held against equals only
    ],
)
def test_which_models_may_be_evicted(fields: dict[str, Any], evicts: bool) -> None:
    """Only models of equal or lower priority, never pinned ones, never those held by `replicas.min`."""
    plan = planned(view(BOX, M, profile(id="a", vram_mb=20000, **fields)))
    assert (plan is not None) is evicts


@pytest.mark.parametrize(
    ("elsewhere", "evicts"),
    [
        (host("spare", 8000, models={"a": On(1000)}), True),  # another replica remains
        (host("spare", 8000, models={"a": On(1000)}, healthy=False), False),
        (host("spare", 8000, models={"a": On(1000)}, draining=True), False),
        (host("spare", 8000, models={"a": On(1000, status="loading")}), False),
    ],
)
def test_a_minimum_counts_only_serving_replicas(elsewhere: Any, evicts: bool) -> None:
    """Replicas on a dead or draining node do not count as serving."""
    box = host("box", 24000, models={"a": On(20000)})
    moment = view(fleet(box, elsewhere), M, profile(id="a", vram_mb=20000, replicas={"min": 1, "max": 2}))
    plan = planned(moment)
    assert (plan is not None and evicted(plan) == {"a"}) is evicts


@pytest.mark.parametrize(
    ("use", "waits_for", "eviction_class", "ready_in"),
    [
        (used(), 0, EvictionClass.IDLE, 0),
        (ReplicaUsage(), 0, EvictionClass.IDLE, 0),  # usage unknown
        (used(1, idle=0), 0, EvictionClass.BUSY, 15),  # busy: after patience_secs
        (used(1, idle=0), 14, EvictionClass.BUSY, 1),
        (used(1, idle=0), 20, EvictionClass.BUSY, -5),
        (used(idle=6.75, age=100), 0, EvictionClass.IDLE, 0),  # costs 45 s * 45 / (67.5 + 13.5), less than the load
        (used(idle=0.2, age=10), 15, EvictionClass.RECENTLY_LOADED, 0.8),  # between two sequential requests
        (used(idle=5, age=10), 15, EvictionClass.RECENTLY_LOADED, 0),
        (used(idle=5, age=0.5), 15, EvictionClass.RECENTLY_LOADED, 0.5),  # just loaded, requests are about to arrive
        (used(1, idle=0, age=10), 0, EvictionClass.RECENTLY_LOADED_BUSY, 20),  # its 30 s outlast the patience
        (used(1, idle=0, age=10), 100, EvictionClass.RECENTLY_LOADED_BUSY, 20),
        (used(1, idle=0, age=29), 0, EvictionClass.RECENTLY_LOADED_BUSY, 15),
        (used(1, idle=0, age=30), 20, EvictionClass.BUSY, -5),
    ],
)
def test_when_a_model_is_evicted(
    use: ReplicaUsage, waits_for: float, eviction_class: EvictionClass, ready_in: float
) -> None:
    """Idle models at once, or once requests have waited as long as they would; busy ones after the patience; young ones
    after their minimum residency, or sooner when unused."""
    plan = plan_for(view(BOX, M, waiting={"m": waits_for}, usages={("a", "box"): use}))
    assert plan.eviction_plan.eviction_class is eviction_class
    assert plan.ready_at - NOW == pytest.approx(ready_in)


def test_requests_of_others_count_as_well() -> None:
    """Requests from another cortex or sent to the engine directly show in the engine's own figures."""
    where = fleet(host("box", 24000, models={"a": On(20000, working=2)}))
    eviction_plan = plan_for(view(where, M, waiting={"m": 0})).eviction_plan
    assert (eviction_plan.eviction_class, eviction_plan.busy) == (EvictionClass.BUSY, 1)


@pytest.mark.parametrize(
    ("own", "rules", "ready_in"),
    [(None, RULES, 20), (60, RULES, 50), (0, RULES, 15), (None, replace(RULES, min_residency_secs=100), 90)],
)
def test_residency_is_the_models_own_else_the_global_one(own: float | None, rules: Rules, ready_in: float) -> None:
    """`min_residency_secs` of the model counts, else the global one."""
    moment = view(
        BOX,
        M,
        profile(id="a", vram_mb=20000, min_residency_secs=own),
        waiting={"m": 0},
        usages={("a", "box"): used(1, idle=0, age=10)},
        rules=rules,
    )
    assert plan_for(moment).ready_at - NOW == pytest.approx(ready_in)


def test_a_sleeping_model_is_never_young() -> None:
    """A sleeping model has no requests, and evicting it costs only what it still holds."""
    where = fleet(host("box", 24000, models={"a": On(8000, status="sleeping", wants_mb=1000)}))
    eviction_plan = plan_for(view(where, M, usages={("a", "box"): used(idle=1, age=1)})).eviction_plan
    assert eviction_plan.eviction_class is EvictionClass.IDLE


def test_evicting_a_sleeping_model_frees_only_what_it_holds() -> None:
    """Evicting a model that holds nothing frees nothing."""
    where = fleet(host("box", 24000, foreign_mb=(8000,), models={"a": On(0, status="sleeping", wants_mb=9000)}))
    plan = plan_for(view(where, M, profile(id="a", vram_mb=9000)))
    assert plan.fit is Fit.TOO_LARGE


@pytest.mark.parametrize(
    ("arrivals", "secs", "usages", "goes"),
    [
        ({"a": asked(60), "b": asked(600)}, {"a": 60, "b": 60}, {}, "b"),  # a longer pause
        ({"a": asked(9), "b": asked(9)}, {"a": 20, "b": 60}, {}, "a"),  # faster to reload
        ({"a": asked(9), "b": asked(900)}, {"a": 1, "b": 60}, {}, "a"),  # seconds times likelihood
        ({"a": asked(300), "b": asked(330, 325, 320, 315, 310, 305, 300)}, {"a": 60, "b": 60}, {}, "a"),  # no bursts
        ({}, {}, {("a", "box"): used(idle=10), ("b", "box"): used(idle=900)}, "b"),  # then the least recently used
        ({}, {}, {}, "a"),  # then the name
        ({"a": asked(9)}, {"a": 600}, {("b", "box"): used(1)}, "a"),  # idle before cheap
        (
            {"a": asked(9)},
            {"a": 600},
            {("a", "box"): used(1), ("b", "box"): used(idle=5, age=5)},
            "a",
        ),  # busy before young
    ],
)
def test_the_cheapest_model_is_evicted(
    arrivals: dict[str, Arrivals], secs: dict[str, float], usages: Any, goes: str
) -> None:
    """Either of the two would free enough."""
    where = fleet(host("box", 24000, 24000, models={"a": On(20000), "b": On(20000, (1,))}))
    times = {model_id: {"box": each} for model_id, each in secs.items()}
    assert evicted(plan_for(view(where, M, arrivals=arrivals, load_secs=times, usages=usages))) == {goes}


@pytest.mark.parametrize(
    ("sizes", "idle_secs", "need", "goes"),
    [
        ({"a": 8000, "b": 8000, "c": 8000}, {"a": 300, "b": 200, "c": 100}, 8000, {"a"}),
        ({"a": 4000, "b": 16000}, {"a": 99, "b": 99}, 8000, {"b"}),  # same reload time, more memory
        ({"a": 4000, "b": 8000, "c": 12000}, {"a": 99, "b": 99, "c": 1}, 12000, {"a", "b"}),
        ({"a": 4000, "b": 4000, "c": 16000}, {}, 16000, {"c"}),  # one rather than two
        ({"a": 12000, "b": 12000}, {}, 24000, {"a", "b"}),
    ],
)
def test_no_more_than_needed_per_mb(
    sizes: dict[str, int], idle_secs: dict[str, float], need: int, goes: set[str]
) -> None:
    """Expected waiting per MiB freed; no eviction that is not needed."""
    where = fleet(host("box", 24000, models={model_id: On(mb) for model_id, mb in sizes.items()}))
    times = {model_id: {"box": 10.0} for model_id in sizes}
    plan = plan_for(
        view(where, profile(vram_mb=need), arrivals={m: asked(secs) for m, secs in idle_secs.items()}, load_secs=times)
    )
    assert evicted(plan) == goes


def test_many_small_models_are_evicted_without_comparing_every_set() -> None:
    """Forty models on one card: the cheapest are evicted one after another, none needlessly."""
    sizes = {f"s{i:02}": On(1000) for i in range(40)}
    arrivals = {model_id: asked(900 - i) for i, model_id in enumerate(sizes)}
    moment = view(fleet(host("box", 40000, models=sizes)), profile(vram_mb=12000), arrivals=arrivals)
    assert evicted(plan_for(moment)) == {f"s{i:02}" for i in range(12)}


def test_a_loaded_model_of_unknown_size_is_taken_to_hold_its_card() -> None:
    """Its neuron reports neither booked nor used memory."""
    where = fleet(host("box", 24000, 12000, models={"a": On(20000, known=False)}, protocol_v1=True))
    assert evicted(plan_for(view(where, profile(vram_mb=22000)))) == {"a"}


@pytest.mark.parametrize("protocol_v1", [False, True])
def test_split_models_free_each_of_their_devices(protocol_v1: bool) -> None:
    """They only help when every device gets enough."""
    where = fleet(
        host("box", 24000, 24000, models={"pair": On(18000, (0, 1)), "one": On(5000)}, protocol_v1=protocol_v1)
    )
    moment = view(where, profile(vram_mb=38000, min_devices=2), profile(id="small", vram_mb=6000))
    assert evicted(plan_for(moment)) == {"pair"}
    assert plan_for(moment, "small").fit is Fit.NOW


# Three tiers on three boxes: `frontier` is split over the flagship's two cards, where `daily` normally runs.
FRONTIER = profile(id="frontier", vram_mb=60000, min_devices=2, min_device_vram_mb=30000, residency_priority=300)
DAILY = profile(id="daily", vram_mb=54000, min_devices=2, min_device_vram_mb=24000, residency_priority=200)
MID = profile(id="mid", vram_mb=20000, min_device_vram_mb=16000)
IMAGE = profile(id="image", vram_mb=18000, min_device_vram_mb=16000)
PEER = profile(id="peer", vram_mb=20000, min_device_vram_mb=16000)
SMALL = profile(id="small", vram_mb=9000, pinned_on=["quadbrat"])
TIERS = FRONTIER, DAILY, MID, IMAGE, PEER, SMALL


def _tiers(flagship: str, mid: str) -> FleetSnapshot:
    return fleet(
        host("beast", 32607, 32607, models={flagship: On(27000, (0, 1))}),
        host("benjy", 24564, models={mid: On(20000)}),
        host("quadbrat", 12288, models={"small": On(9000)}),
    )


@pytest.mark.parametrize(
    ("newcomer", "flagship", "mid", "expected"),
    [
        (IMAGE, "daily", "mid", ("benjy", {"mid"})),  # the mid tier's node, never the flagship's
        (IMAGE, "frontier", "mid", ("benjy", {"mid"})),
        (FRONTIER, "daily", "mid", ("beast", {"daily"})),  # the frontier tier may use the flagship
        (DAILY, "frontier", "mid", None),  # and keeps it
        (MID, "daily", "image", ("benjy", {"image"})),  # peers alternate
        (IMAGE, "daily", "peer", ("benjy", {"peer"})),
        (PEER, "daily", "image", ("benjy", {"image"})),
    ],
)
def test_tiers(newcomer: ModelProfile, flagship: str, mid: str, expected: tuple[str, set[str]] | None) -> None:
    """Which model may evict which on a mixed fleet; the pinned one always stays."""
    plan = planned(view(_tiers(flagship, mid), *TIERS), newcomer.id)
    assert (plan and (plan.node, evicted(plan))) == expected


@pytest.mark.parametrize("use", [used(1, idle=0), used(1, idle=0, age=3), used(idle=0, age=3)])
def test_the_image_model_waits_for_the_mid_tier_rather_than_take_the_flagship(use: ReplicaUsage) -> None:
    """It waits even when the flagship is idle and the mid tier is busy."""
    plan = plan_for(view(_tiers("daily", "mid"), *TIERS, usages={("mid", "benjy"): use}), "image")
    assert (plan.node, plan.ready_at > NOW) == ("benjy", True)


def _eviction(
    name: str, mb: int, *devices: int, eviction_class: EvictionClass = EvictionClass.IDLE, cost: float = 0.0
) -> Eviction:
    return Eviction(
        ResidentModel(replica_key(name, "n"), frozenset(devices), mb, 100, 0, 0.0, 0.0, 0.0, cost), eviction_class, NOW
    )


def _names(found: EvictionPlan | None) -> set[str] | None:
    return None if found is None else {each.resident.key.model_id for each in found.evictions}


def test_no_eviction_when_all_together_free_too_little() -> None:
    """Models that hold none of the missing memory stay too."""
    assert plan_evictions({0: 9000}, [_eviction("a", 4000, 0), _eviction("b", 9000, 1)]) is None
    assert _names(plan_evictions({0: 4000}, [_eviction("a", 4000, 0), _eviction("b", 9000, 1)])) == {"a"}
    assert free_enough({}, [])
    assert not free_enough({0: 1}, [])


def test_a_busy_one_goes_only_where_idle_ones_do_not_free_enough() -> None:
    """Two idle models rather than one in use; one in use rather than two."""
    idle = [_eviction("a", 4000, 0, cost=9.0), _eviction("b", 4000, 0, cost=9.0)]
    busy = _eviction("c", 9000, 0, eviction_class=EvictionClass.BUSY)
    assert _names(plan_evictions({0: 8000}, [*idle, busy])) == {"a", "b"}
    assert _names(plan_evictions({0: 9000}, [*idle, busy])) == {"c"}


def test_a_newly_loaded_model_serves_its_waiting_requests_first() -> None:
    """However long the other model has waited: requests still in the admission queue are about to reach this one, and
    evicting it would waste its load."""
    where = fleet(host("box", 24000, models={"a": On(20000)}))
    moment = view(
        where, M, waiting={"m": 1000, "a": 1}, usages={("a", "box"): used(age=1)}, rules=Rules(min_residency_secs=0)
    )
    assert plan_for(moment).ready_at > moment.now


def _exchange(waits: WaitingRequests, working: int, *arrivals: float, idle: float = 0) -> float:
    """In how many seconds `a` may be evicted from the only card for `m`. Both load in 40 s."""
    moment = view(
        BOX,
        M,
        usages={("a", "box"): used(working, idle=idle)},
        arrivals={"a": asked(*arrivals)},
        load_secs={"a": {"box": 40.0}, "m": {"box": 40.0}},
        rules=Rules(),
    )
    return plan_for(replace(moment, waiting={"m": waits})).ready_at - NOW


def test_one_request_does_not_stop_a_model_that_many_use() -> None:
    """Eight at work, ten more each load: one request waits for the full patience. Ten requests wait a tenth as long."""
    burst = tuple(range(36, -1, -4))
    assert _exchange(WaitingRequests(1, NOW), 8, *burst) == 300
    assert _exchange(WaitingRequests(10, NOW), 8, *burst) == pytest.approx((6 * 40 * 11 / 2 - 40) / 10)


def test_many_requests_soon_get_the_memory_of_a_model_that_one_uses() -> None:
    """Nine requests make up for its eviction nine times as fast as one."""
    assert _exchange(WaitingRequests(1, NOW), 1, 0) == pytest.approx(6 * 40 - 40)
    assert _exchange(WaitingRequests(9, NOW - 4), 1, 0) == pytest.approx((6 * 40 - 40 - 4 * 5) / 9)


def test_an_idle_model_that_many_use_waits_for_its_next_requests() -> None:
    """It was idle for 20 s after eight requests, so it is as likely as not requested again soon. Later it goes at
    once."""
    burst = tuple(range(60, 19, -5))
    expected = 20 / (30 + 20) * asked(*burst).cold_start_wait(NOW, 40) - 40
    assert expected > 0
    assert _exchange(WaitingRequests(1, NOW), 0, *burst, idle=20) == pytest.approx(expected)
    assert _exchange(WaitingRequests(1, NOW), 0, *(180 + each for each in burst), idle=200) == 0


def test_an_idle_model_of_a_lower_priority_goes_at_once() -> None:
    low = profile(id="a", vram_mb=20000, residency_priority=50)
    for other, ready in ((low, True), (profile(id="a", vram_mb=20000), False)):
        uses, burst = {("a", "box"): used(idle=2)}, {"a": asked(*range(20, 1, -1))}
        moment = view(BOX, M, other, waiting={"m": 0}, usages=uses, arrivals=burst, rules=RULES)
        assert (plan_for(moment).ready_at <= NOW) is ready


def test_what_a_cold_start_costs() -> None:
    """From what followed earlier arrivals, and two loads without other requests; more while requests arrive fast."""
    assert asked().cold_start_wait(NOW, 40) == 40
    assert asked(100).cold_start_wait(NOW, 40) == 40
    assert asked(110, 100).cold_start_wait(NOW, 40) == (40 + 30 + 40 + 2 * 40) / 4
    assert asked(3, 2, 1).cold_start_wait(NOW, 40) == 40 * 4 / 2


GREEDY, MODEST = Caller("g", "greedy"), Caller("m", "modest")


def _swap(
    newcomer: Caller | None, user: Caller | None, accounts: dict[str, float], *, queued: int = 1, age: float = 5
) -> float:
    """In how many seconds a newly loaded, busy model of `user` is evicted for one that `newcomer` has waited for for
    2 s. Both load in 40 s."""
    use = replace(used(3, idle=0, age=age), callers=frozenset() if user is None else frozenset({user}))
    waits = WaitingRequests(queued, NOW - 2, frozenset() if newcomer is None else frozenset({newcomer}))
    moment = view(
        BOX,
        M,
        usages={("a", "box"): use},
        arrivals={"a": asked(*range(36, -1, -4))},
        load_secs={"a": {"box": 40.0}, "m": {"box": 40.0}},
        rules=Rules(),
    )
    return plan_for(replace(moment, waiting={"m": waits}, accounts=accounts)).ready_at - NOW


def test_a_caller_that_used_less_waits_only_for_requests_under_way() -> None:
    """And for a tenth of the swap time after the load, not for the minimum residency: the key that makes others wait
    pays with its turn."""
    assert _swap(MODEST, GREEDY, {"g": 500.0}) == pytest.approx(0.1 * 80 - 5)
    assert _swap(MODEST, GREEDY, {"g": 500.0}, age=8) == 0


def test_a_caller_that_used_more_waits_for_all_of_its_patience() -> None:
    """However many requests it sends."""
    for queued in (1, 500):
        assert _swap(GREEDY, MODEST, {"g": 500.0}, queued=queued) == 298


def test_the_requests_of_one_caller_count_as_one_against_another() -> None:
    """Among callers that have used about the same."""
    assert _swap(GREEDY, MODEST, {}, queued=500) == _swap(GREEDY, MODEST, {}, queued=1)


PEERS = [f"a{number}" for number in range(4)]


def _swap_for_many(
    users: int, *, each_its_own: bool = False, since: float = 2.0, served: float = 1e9, priority: int = 100
) -> float:
    """In how many seconds a model of these other users, or one of each, is evicted for one that a key has waited for
    since then. It was served that long ago, by another model. `priority`: of the model of those others."""
    names = PEERS[:users] if each_its_own else ["a"]
    keys = [Caller(name, name) for name in PEERS[:users]]
    owners = {name: frozenset({key} if each_its_own else keys) for name, key in zip(names, keys, strict=False)}
    box = fleet(host("box", 24000, models={name: On(24000 // len(names)) for name in names}))
    waits = WaitingRequests(1, NOW - since, frozenset({GREEDY}), served_at=NOW - served)
    moment = view(
        box,
        profile(vram_mb=24000),
        *(profile(id=name, vram_mb=24000 // len(names), residency_priority=priority) for name in names),
        usages={(name, "box"): replace(used(idle=20, age=600), callers=owner) for name, owner in owners.items()},
        arrivals={name: asked(*range(56, 19, -4)) for name in names},
        load_secs={name: {"box": 40.0} for name in ("m", *names)},
        rules=Rules(patience_secs=1e6),
    )
    return plan_for(replace(moment, waiting={"m": waits})).ready_at - NOW


def test_a_swap_for_one_key_that_makes_many_wait_comes_late() -> None:
    """Each of them waits, and each counts."""
    alone, four = _swap_for_many(1), _swap_for_many(4)
    assert four + 42 == pytest.approx(16 * (alone + 42))


def test_many_keys_whose_models_would_go_together_count_like_many_of_one_model() -> None:
    """Although each of their models alone could be evicted sooner."""
    one, four = _swap_for_many(1, each_its_own=True), _swap_for_many(4, each_its_own=True)
    assert four + 42 == pytest.approx(4 * 16 * (one + 42))


@pytest.mark.parametrize("users", [1, 4])
def test_idle_models_of_a_lower_priority_go_at_once_with_users_too(users: int) -> None:
    assert _swap_for_many(users, each_its_own=True, priority=50) <= 0


def test_a_key_waits_from_its_last_turn_on() -> None:
    """One that waits for several models does not get the next one at once because that has waited meanwhile."""
    assert _swap_for_many(2, since=50, served=3) == pytest.approx(_swap_for_many(2, since=3))


def test_without_another_caller_nothing_changes() -> None:
    """With one key or none: the same time as when no key is known."""
    for queued in (1, 500):
        expected = _swap(None, None, {}, queued=queued)
        assert _swap(GREEDY, GREEDY, {"g": 500.0}, queued=queued) == expected
        assert _swap(GREEDY, None, {"g": 500.0}, queued=queued) == expected
        assert _swap(None, GREEDY, {"g": 500.0}, queued=queued) == expected


def test_a_model_whose_requests_wait_for_a_place_can_be_evicted() -> None:
    """It serves as many as its neuron allows. Those that wait do not protect it, or it would never leave."""
    moment = view(BOX, M, waiting={"m": 1000, "a": 60}, usages={("a", "box"): used(3, idle=0)})
    assert plan_for(moment).ready_at <= NOW
