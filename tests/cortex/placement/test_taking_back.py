"""A key that displaces a model of others: they take the memory back from it, not from each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex.accounts.caller import Caller
from cortex.config.settings import Rules
from cortex.fleet.snapshot import FleetSnapshot
from cortex.placement.fair_queue import is_starving, schedule_loads
from cortex.placement.inputs import PlanningView, WaitingRequests
from tests.cortex.fleets import On, fleet, host, replica_key
from tests.cortex.views import NOW, evicted, plan_for, profile, used, view

NOISY, *QUIET = (Caller(name, name) for name in ("noisy", "q0", "q1", "q2", "q3"))
DISPLACED, OTHERS = frozenset(QUIET[:2]), frozenset(QUIET[2:])
PATIENCE_SECS = 300.0
LOADED = fleet(host("box", 24000, models={"other": On(12000), "noisy": On(12000)}))
LOADING = fleet(host("box", 24000, models={"other": On(12000), "noisy": On(12000, status="loading")}))


def _displaced(
    there: FleetSnapshot = LOADED,
    *,
    by: str | None = "noisy",
    age: float = 600.0,
    accounts: dict[str, float] | None = None,
    waits: frozenset[Caller] = DISPLACED,
) -> PlanningView:
    """`m` of these callers waits; `other` and `noisy`, loaded that long ago, are in use."""
    moment = view(
        there,
        *(profile(id=name, vram_mb=12000) for name in ("m", "other", "noisy")),
        usages={
            ("other", "box"): replace(used(idle=1, age=600), callers=OTHERS),
            ("noisy", "box"): replace(used(1, idle=0, age=age), callers=frozenset({NOISY})),
        },
        load_secs={name: {"box": 40.0} for name in ("m", "other", "noisy")},
        rules=Rules(patience_secs=PATIENCE_SECS),
    )
    return replace(
        moment,
        waiting={"m": WaitingRequests(500, NOW - 100, waits), "noisy": WaitingRequests(9, NOW - 1, frozenset({NOISY}))},
        displaced_by={} if by is None else {"m": replica_key(by, "box")},
        accounts=accounts or {},
    )


def test_a_displaced_model_waits_for_its_displacer_rather_than_displace_others() -> None:
    """While that loads, the others are spared; without a displacer they would not be."""
    for by, loads in ((None, ["m"]), ("noisy", [])):
        assert [plan.model_id for plan in schedule_loads(_displaced(LOADING, by=by)).loads] == loads


def test_others_are_not_spared_once_the_displacer_has_gone() -> None:
    plan = plan_for(_displaced(fleet(host("box", 24000, models={"other": On(24000)}))))
    assert (evicted(plan), plan.ready_at <= NOW) == ({"other"}, True)


def test_many_take_the_memory_back_after_a_short_turn() -> None:
    """A tenth of the swap time, not the minimum residency; the displacer's keys are fewer."""
    plan = plan_for(_displaced(age=3))
    assert evicted(plan) == {"noisy"}
    assert plan.ready_at - NOW == pytest.approx(0.1 * 80 - 3)
    assert plan_for(_displaced(age=9)).ready_at <= NOW


def test_one_key_takes_it_back_from_one_by_the_usual_rules() -> None:
    """Otherwise the turns of one would be short, and those of the other long."""
    plan = plan_for(_displaced(age=3, waits=frozenset(QUIET[:1])))
    assert plan.ready_at - NOW >= 12


def test_a_key_that_has_used_clearly_less_keeps_what_it_displaced() -> None:
    """It had the better claim to the memory, and has it still."""
    used_much = {each.key_id: 1000.0 for each in QUIET}
    assert plan_for(_displaced(age=600, accounts=used_much)).ready_at - NOW == PATIENCE_SECS - 100


def test_a_key_has_one_turn_at_a_time() -> None:
    """While one of its models loads, or has just been loaded, none of its others starves or loses patience."""
    patient = WaitingRequests(9, NOW - 400, frozenset({NOISY}))
    for status, age, starves in (
        ("loading", 600, False),
        ("loaded", 0.1, False),
        ("loaded", 600, True),
        ("unloaded", 600, True),
    ):
        there = fleet(host("box", 24000, models={"noisy": On(12000, status=status), "other": On(12000)}))
        moment = _displaced(there, age=age)
        moment = replace(moment, waiting={"noisy": patient, "m": patient})
        assert is_starving(moment, "m") is starves


def test_a_swap_counts_for_the_users_of_all_models_on_the_device() -> None:
    """The noisy key waits as long for one of four models of a key each as for one model of four keys."""
    ready_at = []
    for names, each in ((["a"], 4), (["a", "b", "c", "d"], 1)):
        keys = [frozenset(QUIET[at : at + each]) for at in range(0, 4, each)]
        moment = view(
            fleet(host("box", 24000, models={name: On(24000 // len(names)) for name in names})),
            profile(id="noisy", vram_mb=6000),
            *(profile(id=name, vram_mb=24000 // len(names)) for name in names),
            usages={
                (name, "box"): replace(used(idle=20, age=600), callers=callers)
                for name, callers in zip(names, keys, strict=True)
            },
            load_secs={name: {"box": 40.0} for name in ("noisy", *names)},
            rules=Rules(patience_secs=1e6),
        )
        waiting = {"noisy": WaitingRequests(1, NOW - 2, frozenset({NOISY}))}
        ready_at.append(plan_for(replace(moment, waiting=waiting), "noisy").ready_at - NOW)
    assert ready_at[0] == pytest.approx(ready_at[1])
    assert ready_at[0] > 16 * 10
