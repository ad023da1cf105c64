"""Which model loads next, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.config.catalogue import Catalogue
from cortex.config.profile import ModelProfile
from cortex.config.settings import Rules
from cortex.fleet.snapshot import NodeSnapshot, Reservation
from cortex.placement.fair_queue import LoadSchedule, in_fair_order, schedule_loads
from cortex.placement.inputs import Backoff, PlanningView, ReplicaUsage, WaitingRequests
from cortex.placement.load_plan import Fit, LoadPlan
from tests.cortex.fleets import On, fleet, host, replica_key
from tests.cortex.views import NOW, RULES, evicted, profile, used, view

A, B, C = (profile(id=name, vram_mb=20000) for name in "abc")


@dataclass
class Box:
    """One card shared by its models, with a clock the test advances. A load takes `load_secs`; an evicted model
    leaves once it has no requests."""

    models: tuple[ModelProfile, ...]
    rules: Rules = RULES
    load_secs: float = 10.0
    now: float = 0.0
    loaded: str | None = None
    loading: str | None = None
    evicting: str | None = None
    waiting: dict[str, WaitingRequests] = field(default_factory=dict)
    working: int = 0
    loaded_at: float = 0.0
    last_used: float = 0.0
    ready_at: float = 0.0
    served: list[str] = field(default_factory=list)
    loads: list[tuple[float, str]] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def view(self) -> PlanningView:
        there = {name: On(20000) for name in (self.loaded,) if name}
        reserved = (Reservation(self.loading, "box", (0,), 20000),) if self.loading else ()
        gone = ((self.evicting, "box"),) if self.evicting else ()
        use = ReplicaUsage(self.working, self.last_used, self.loaded_at)
        return PlanningView(
            now=self.now,
            catalogue=Catalogue(models=self.models),
            fleet=fleet(host("box", 24000, models=there), reservations=reserved, evicting=gone),
            rules=self.rules,
            usages={replica_key(self.loaded, "box"): use} if self.loaded else {},
            waiting=dict(self.waiting),
        )

    def state(self) -> tuple[str | None, str | None, str | None]:
        """The loaded model, the loading one and the leaving one."""
        return self.loaded, self.loading, self.evicting

    def ask(self, *models: str) -> None:
        """One request for each, in this order."""
        for name in models:
            if self.loaded == name and self.evicting != name:
                self.served.append(name)
                self.last_used = self.now
            else:
                known = self.waiting.get(name, WaitingRequests(0, self.now))
                self.waiting[name] = WaitingRequests(known.count + 1, known.since)

    def look(self) -> LoadSchedule:
        schedule = schedule_loads(self.view())
        for plan in schedule.loads:
            self._begin(plan)
        self._settle()
        return schedule

    def pass_time(self, secs: float, *, step: float = 0.25) -> None:
        """Advances the clock, running the scheduler every `step`."""
        until = self.now + secs
        while self.now < until - 1e-9:
            self.now += step
            if self.working:
                self.last_used = self.now
            self._settle()
            self.look()

    def _begin(self, plan: LoadPlan) -> None:
        assert self.loading is None, "two loads at once into one place"
        self.loading = plan.model_id
        self.evicting = next(iter(evicted(plan)), None)
        self.ready_at = self.now + self.load_secs

    def _settle(self) -> None:
        if self.evicting and not self.working:
            self.loaded = self.evicting = None
            self.ready_at = self.now + self.load_secs
        if self.loading and not self.evicting and self.now >= self.ready_at:
            self.loaded, self.loading, self.loaded_at = self.loading, None, self.now
            self.loads.append((self.now, self.loaded))
            done = self.waiting.pop(self.loaded, WaitingRequests(0, self.now))
            self.served += [self.loaded] * done.count
            self.waited.append(self.now - done.since)
            self.last_used = self.now


def _order(served: Iterable[str]) -> str:
    return "".join(served)


def test_abcabc_becomes_aabbcc() -> None:
    """One load serves every request waiting for a model: three loads for six requests, in order of arrival."""
    box = Box((A, B, C))
    box.ask(*"abcabc")
    box.look()
    box.pass_time(120)
    assert _order(box.served) == "aabbcc"
    assert [name for _, name in box.loads] == ["a", "b", "c"]


def test_peers_take_turns() -> None:
    """A serves without pause. B gets the card once it has waited out the patience and A has had its minimum
    residency; then A again."""
    box = Box((A, B), RULES)
    box.ask("a")
    box.look()
    box.pass_time(10)
    assert (box.state(), box.now) == (("a", None, None), 10)
    box.working = 2
    box.ask("b")
    schedule = box.look()
    assert (schedule.loads, schedule.recheck_at) == ((), 40)
    assert schedule.wait_reasons == {"b": "waiting for its turn: box: fits after evicting a; a has 2 requests"}
    box.pass_time(29.75)
    assert box.state() == ("a", None, None)  # still within its 30 s
    box.pass_time(0.25)
    assert box.state() == ("a", "b", "a")  # marked to leave, drained first
    box.ask("a")
    assert _order(box.served) == "a"  # no new requests for a leaving model
    box.pass_time(60)
    assert box.state() == ("a", "b", "a")  # however long draining takes
    box.working = 0
    box.pass_time(10.5)
    assert box.state() == ("b", None, None)
    box.working = 1
    box.pass_time(29)
    assert box.state() == ("b", None, None)
    box.pass_time(1)
    assert box.state() == ("b", "a", "b")
    box.working = 0
    box.pass_time(10.5)
    assert (box.state(), _order(box.served)) == (("a", None, None), "aba")


def test_an_idle_peer_is_evicted_at_once() -> None:
    """After its minimum residency an idle peer is evicted at once; before that, only after a wait, in which it may show
    that it is still in use."""
    box = Box((A, B))
    box.ask("a")
    box.look()
    box.pass_time(50)
    box.ask("b")
    assert [plan.model_id for plan in box.look().loads] == ["b"]
    box.pass_time(10.25)
    assert box.state() == ("b", None, None)
    box.ask("a")
    assert box.look().loads == ()
    box.pass_time(box.rules.pause_secs + 0.25)
    assert box.state() == (None, "a", None)


def test_no_model_starves_among_busy_peers() -> None:
    """Three models in constant demand: each gets its turn, and waits no longer than the others' turns take."""
    box = Box((A, B, C), load_secs=5)
    for _ in range(1200):
        box.ask(*"abc")
        box.working = 1 if box.loaded and not box.evicting else 0  # drained within a quarter of a second
        box.pass_time(0.25)
    names = [name for _, name in box.loads]
    assert names[:9] == list("abcabcabc")
    turn_secs = box.rules.min_residency_secs + box.load_secs + 1
    assert max(box.waited) <= 3 * turn_secs
    assert min(after - before for (before, _), (after, _) in zip(box.loads, box.loads[1:], strict=False)) >= 30


WAIT_FOR_A_LOAD = fleet(host("box", 24000))


@pytest.mark.parametrize(
    ("waiting", "first"),
    [
        ({"a": 5, "b": 9}, "b"),  # equal priorities: longest wait
        ({"a": 5, "b": 5}, "a"),  # then the name
        ({"a": 50, "high": 1}, "high"),  # priority before wait
        ({"a": 60, "high": 1}, "a"),  # starvation before priority
        ({"a": 61, "high": 60}, "a"),  # among starved models, the longest wait
        ({"a": 60, "high": 61}, "high"),
    ],
)
def test_order_of_turns(waiting: dict[str, float], first: str) -> None:
    """Starving models come first, then the priority, the wait and the name decide."""
    high = profile(id="high", vram_mb=20000, residency_priority=200)
    schedule = schedule_loads(view(WAIT_FOR_A_LOAD, A, B, high, waiting=waiting))
    assert [plan.model_id for plan in schedule.loads] == [first]
    assert set(schedule.wait_reasons) == set(waiting) - {first}
    assert not schedule.rejected


def test_loads_that_fit_together_start_together() -> None:
    """One pass starts every load that fits, each on its own device."""
    where = fleet(host("box", 24000, 24000), host("other", 24000))
    schedule = schedule_loads(view(where, A, B, C, waiting={"a": 3, "b": 2, "c": 1}))
    assert [(plan.model_id, plan.node, plan.devices) for plan in schedule.loads] == [
        ("a", "box", (0,)),
        ("b", "box", (1,)),
        ("c", "other", (0,)),
    ]


def test_two_loads_do_not_evict_the_same_model() -> None:
    """Two waiting models: models are evicted for the first, the second waits for its turn."""
    where = fleet(host("box", 24000, 24000, models={"a": On(20000), "d": On(20000, (1,))}))
    models = A, B, C, profile(id="d", vram_mb=20000)
    schedule = schedule_loads(view(where, *models, waiting={"b": 2, "c": 1}))
    assert [(plan.model_id, evicted(plan)) for plan in schedule.loads] == [("b", {"a"}), ("c", {"d"})]


@pytest.mark.parametrize(
    "where",
    [
        fleet(host("box", 24000, models={"a": On(20000)})),  # serving
        fleet(host("box", 24000, models={"a": On(20000, status="recovering")})),  # coming up
        fleet(host("box", 24000), host("other", 24000), reservations=(Reservation("a", "other", (0,), 20000),)),
    ],
)
def test_served_and_loading_models_are_skipped(where: object) -> None:
    """No load is planned for a model that serves or is being loaded."""
    assert schedule_loads(view(where, A, waiting={"a": 1})) == LoadSchedule()  # type: ignore[arg-type]


def test_a_rejected_model_does_not_stop_the_others() -> None:
    """Refusing one model does not affect the others."""
    top = profile(id="top", vram_mb=20000, residency_priority=500)
    where = fleet(host("box", 24000, models={"top": On(20000)}), host("small", 9000))
    there = profile(id="there", vram_mb=20000, pinned_on=["box"], residency_priority=100)
    moment = view(where, there, top, profile(id="s", vram_mb=4000), waiting={"there": 5, "s": 1, "gone": 1})
    schedule = schedule_loads(moment)
    assert [plan.model_id for plan in schedule.loads] == ["s"]
    assert {m: error.code for m, error in schedule.rejected.items()} == {
        "there": "insufficient_vram",
        "gone": "model_not_found",
    }


def test_the_recheck_is_at_the_earliest_possible_start() -> None:
    """The recheck is at the end of the first backoff or wait."""
    where = fleet(host("box", 24000, models={"a": On(20000)}), host("other", 40000))
    backoffs = {("b", "other"): Backoff(NOW + 9, "restarts", temporary=True), ("b", "box"): Backoff(NOW + 400, "no")}
    moment = view(where, A, B, waiting={"b": 1}, usages={("a", "box"): used(1)}, backoffs=backoffs)
    assert schedule_loads(moment).recheck_at == NOW + 9


PAIR = profile(id="pair", vram_mb=40000, min_devices=2)
S, T = profile(id="s", vram_mb=20000), profile(id="t", vram_mb=20000)


def _two_cards(first: str, second: str, **devices: On) -> NodeSnapshot:
    return host("box", 24000, 24000, models={first: On(20000), second: On(20000, (1,)), **devices})


@pytest.mark.parametrize(("waits", "taken"), [(20, True), (60, False)])
def test_memory_is_reserved_for_a_starving_model(waits: float, taken: bool) -> None:
    """A split model needs two cards, one with a young busy model. Otherwise small models would keep taking the free
    card, each young in its schedule."""
    where = fleet(_two_cards("a", "s"))
    uses = {("a", "box"): used(1, idle=0, age=5), ("s", "box"): used(idle=900)}
    schedule = schedule_loads(view(where, A, S, T, PAIR, waiting={"pair": waits, "t": 1}, usages=uses))
    assert [plan.model_id for plan in schedule.loads] == (["t"] if taken else [])
    assert "pair" in schedule.wait_reasons


@pytest.mark.parametrize(("waits", "taken"), [(20, True), (60, False)])
def test_no_load_starts_on_a_node_reserved_for_a_starving_model(waits: float, taken: bool) -> None:
    """Otherwise one of the cards would always be loading."""
    loading = host("box", 24000, 24000, models={"a": On(20000, status="loading"), "s": On(20000, (1,))})
    uses = {("s", "box"): used(idle=900)}
    schedule = schedule_loads(view(fleet(loading), A, S, T, PAIR, waiting={"pair": waits, "t": 1}, usages=uses))
    assert [plan.model_id for plan in schedule.loads] == (["t"] if taken else [])
    assert not schedule.rejected


def test_a_split_model_gets_its_turn_among_small_ones() -> None:
    """Six small models come and go on two cards, never on both at once. The one that needs both waits until it
    starves, then for the models loaded by then."""
    rules = RULES
    small = tuple(profile(id=f"s{i}", vram_mb=20000) for i in range(6))
    holds: list[str | None] = [None, None]
    since, now, pair_loaded = [0.0, 0.0], 0.0, None
    waiting = {each.id: WaitingRequests(1, 0.0) for each in small} | {"pair": WaitingRequests(1, 1.0)}
    while now < 300 and pair_loaded is None:
        there = {name: On(20000, (i,)) for i, name in enumerate(holds) if name}
        moment = PlanningView(
            now=now,
            catalogue=Catalogue(models=(*small, PAIR)),
            fleet=fleet(host("box", 24000, 24000, models=there)),
            rules=rules,
            usages={replica_key(name, "box"): ReplicaUsage(1, now, since[i]) for i, name in enumerate(holds) if name},
            waiting={m: each for m, each in waiting.items() if m not in there and each.since <= now},
        )
        for plan in schedule_loads(moment).loads:
            if plan.model_id == "pair":
                pair_loaded = now
                break
            (index,) = plan.devices
            holds[index], since[index] = plan.model_id, now + (15 if now == 0 else 0) * index
            waiting = {**waiting, **{name: WaitingRequests(1, now) for name in evicted(plan)}}
        now += 1.0
    assert pair_loaded is not None
    assert pair_loaded <= rules.starvation_secs + rules.min_residency_secs + rules.patience_secs


def test_each_load_counts_for_the_next_decision() -> None:
    """Each decision counts the earlier ones: a model that still fits is loaded, one that does not fit waits."""
    half = profile(id="half", vram_mb=12000)
    schedule = schedule_loads(
        view(
            fleet(host("box", 24000)),
            half,
            A,
            profile(id="rest", vram_mb=11000),
            waiting={
                "half": 3,
                "a": 2,
                "rest": 1,
            },
        )
    )
    assert [(plan.model_id, plan.fit) for plan in schedule.loads] == [("half", Fit.NOW), ("rest", Fit.NOW)]
    assert "waiting for half" in schedule.wait_reasons["a"]


WAITS = (("a", 5.0, 1), ("b", 4.0, 9), ("c", 8.0, 1))
"""Models, since when requests wait for them, and how many."""


def _moment(*models: ModelProfile) -> PlanningView:
    return view(fleet(host("box", 24000)), *models)


def _claimed(since: float, *callers: Caller, count: int = 1) -> WaitingRequests:
    return WaitingRequests(count, since, frozenset(callers))


def test_the_model_of_the_caller_that_used_least_goes_first() -> None:
    """Before one that has waited longer, with many more requests, for a caller that used more."""
    greedy, modest = Caller("g", "greedy"), Caller("m", "modest")
    waiting = {"a": _claimed(NOW - 50, greedy, count=500), "b": _claimed(NOW - 1, modest)}
    moment = replace(_moment(A, B, C), waiting=waiting, accounts={"g": 60.0, "m": 5.0})
    assert in_fair_order(moment, waiting) == ["b", "a"]
    assert in_fair_order(replace(moment, accounts={}), waiting) == ["a", "b"]
    waiting["c"] = _claimed(NOW - 10, ANONYMOUS, greedy)
    assert in_fair_order(replace(moment, waiting=waiting), waiting) == ["b", "a", "c"]


def test_a_starving_model_goes_first_whatever_its_caller_has_used() -> None:
    greedy, modest = Caller("g", "greedy"), Caller("m", "modest", priority=5)
    starved = NOW - RULES.starvation_secs
    waiting = {"a": _claimed(starved, greedy), "b": _claimed(NOW - 1, modest)}
    moment = replace(_moment(A, B), waiting=waiting, accounts={"g": 1e6})
    assert in_fair_order(moment, waiting) == ["a", "b"]


def test_priorities_of_keys_come_before_those_of_models_and_anonymous_callers_last() -> None:
    low = profile(id="low", vram_mb=20000, residency_priority=1)
    urgent, usual = Caller("u", "urgent", priority=1), Caller("k", "usual")
    waiting = {
        "a": _claimed(NOW - 50, ANONYMOUS),
        "b": _claimed(NOW - 1, usual),
        "low": _claimed(NOW, urgent),
    }
    moment = replace(_moment(A, B, low), waiting=waiting)
    assert in_fair_order(moment, waiting) == ["low", "b", "a"]


@pytest.mark.parametrize("callers", [(), (ANONYMOUS,), (Caller("k", "k"),)])
def test_with_one_key_or_none_the_order_is_that_of_the_waits(callers: tuple[Caller, ...]) -> None:
    """As if there were no keys, whatever the key has used."""
    waiting = {name: _claimed(NOW - secs, *callers, count=count) for name, secs, count in WAITS}
    plain = {name: WaitingRequests(count, NOW - secs) for name, secs, count in WAITS}
    expected = in_fair_order(replace(_moment(A, B, C), waiting=plain), plain)
    moment = replace(_moment(A, B, C), waiting=waiting, accounts={"k": 100.0})
    assert in_fair_order(moment, waiting) == expected == ["b", "c", "a"]
