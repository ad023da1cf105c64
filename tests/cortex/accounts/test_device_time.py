"""Who pays for the devices, and what that entitles the others to."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.fairness.claims import advantage, claim_of
from cortex.accounts.fairness.device_time import PRESENT_SECS, DeviceTime, EngineUse

A, B, C = (Caller(name, name) for name in "abc")
EVER = 1e12
"""A half-life that hides the fading."""


def _engine(
    model: str, now: Mapping[str, int] | None = None, *, devices: int = 1, loading: bool = False, begun: int = 0
) -> EngineUse:
    at_work = dict(now or {})
    return EngineUse(model, model, devices, loading, at_work, {key: count + begun for key, count in at_work.items()})


def test_engines_are_charged_to_the_callers_they_serve() -> None:
    """By devices, requests and weight; clients without a key pay nothing, and no key pays for them."""
    heavy = Caller("h", "h", weight=2)
    accounts = DeviceTime(lambda: EVER, caller_of={"a": A, "b": B, "h": heavy}.get)
    engines = [
        _engine("m", {"a": 3, "b": 1}, devices=2),
        _engine("n", {"h": 1}),
        _engine("o", {"a": 1, "": 1}),
        _engine("idle"),
    ]
    accounts.sample(engines, {}, 0)
    accounts.sample(engines, {}, 4)
    assert accounts.accounts == pytest.approx({"a": 6 + 2, "b": 2, "h": 2})
    assert accounts.charged == pytest.approx({("a", "serving"): 8, ("b", "serving"): 2, ("h", "serving"): 4})


def test_making_others_wait_costs_more() -> None:
    """Each second counts once more for every other caller that waits for a model without an engine."""
    accounts = DeviceTime(lambda: EVER)
    engines, waiting = [_engine("m", {"a": 1})], {"n": [B, C, A], "m": [B]}
    accounts.sample(engines, waiting, 0)
    accounts.sample(engines, waiting, 1)
    assert accounts.accounts == pytest.approx({"a": 3})
    assert accounts.charged == pytest.approx({("a", "serving"): 1, ("a", "waiting_caused"): 2})


def test_a_load_is_charged_to_those_that_caused_it() -> None:
    """Those that wait for the model; if it was evicted for another, those that waited for that other."""
    accounts = DeviceTime(lambda: EVER)
    loading = [_engine("m", loading=True)]
    accounts.sample(loading, {"m": [A]}, 0)
    accounts.sample(loading, {"m": [A]}, 10)
    assert accounts.accounts == pytest.approx({"a": 10})
    assert accounts.charged == pytest.approx({("a", "loading"): 10})
    accounts.evicted(["m"], [B])
    accounts.sample(loading, {"m": [A]}, 15)
    assert accounts.accounts == pytest.approx({"a": 10, "b": 10})  # one caller waits for it meanwhile
    accounts.sample([_engine("m", {"a": 1})], {}, 16)
    accounts.sample(loading, {"m": [A]}, 17)
    assert accounts.accounts == pytest.approx({"a": 12, "b": 10})  # its next load is its own


def test_the_names_of_keys_that_are_gone_are_forgotten() -> None:
    """Or a year of rotated keys would stay on the page of metrics. Accounts fade by themselves."""
    people = [f"oidc:{number}@example.com" for number in range(9)]
    known = {"a": A, "b": B}
    accounts = DeviceTime(lambda: EVER, caller_of=known.get)
    engines = [_engine("m", dict.fromkeys(["a", "b", *people], 1))]
    for now in (0, 1):
        accounts.sample(engines, {}, now)
    del known["a"]
    accounts.keep_callers({"b", "c"})
    accounts.sample(engines, {}, 2)  # with a request of a key that is gone
    assert accounts.charged == pytest.approx({("b", "serving"): 2 / 11, ("oidc:people", "serving"): 18 / 11})
    assert accounts.several_callers


def test_accounts_fade() -> None:
    accounts = DeviceTime(lambda: 10.0, {"a": 8.0, "b": 0.015})
    accounts.sample([], {}, 0)
    accounts.sample([], {}, 10)
    assert accounts.accounts == pytest.approx({"a": 4})


def test_without_a_half_life_there_are_no_accounts() -> None:
    accounts = DeviceTime(lambda: 0.0, {"a": 8.0})
    for now in (0, 10):
        accounts.sample([_engine("m", {"a": 1})], {}, now)
    assert (accounts.accounts, accounts.users("m", "m", 10)) == ({}, frozenset())


def test_an_idle_caller_saves_nothing_up() -> None:
    """Who comes back has at least the account of the least of those present, and keeps a higher one of its own."""
    accounts = DeviceTime(lambda: EVER, {"a": 50.0, "b": 70.0, "c": 90.0})
    for caller in (A, B):
        accounts.waits(caller, "m", 0)
    accounts.waits(Caller("new", "new"), "m", 1)
    accounts.waits(C, "m", 1)
    assert accounts.accounts == {"a": 50, "b": 70, "c": 90, "new": 50}
    accounts.waits(ANONYMOUS, "m", 1)
    assert "" not in accounts.accounts


def test_users_of_an_engine_stay_for_a_moment() -> None:
    """They have a claim to a model that they use again and again, and pay for it in between."""
    accounts = DeviceTime(lambda: EVER)
    accounts.sample([_engine("m", {"a": 1, "": 1})], {}, 0)
    assert accounts.users("m", "m", 0) == {A, ANONYMOUS}
    idle = [EngineUse("m", "m", 1, False, {}, {})]
    accounts.sample(idle, {}, 5)
    assert accounts.accounts == pytest.approx({"a": 2.5})
    accounts.sample(idle, {}, PRESENT_SECS + 1)
    assert not accounts.users("m", "m", PRESENT_SECS + 1)
    accounts.sample([], {}, PRESENT_SECS + 2)
    assert not accounts.users("m", "m", PRESENT_SECS + 2)


def test_those_that_waited_for_a_model_use_it_from_the_moment_it_is_loaded() -> None:
    """Before any sample has seen their requests there: otherwise another key would take the memory back at once."""
    accounts = DeviceTime(lambda: EVER)
    accounts.waits(A, "m", 0)
    assert accounts.users("m", "m", 0.1) == {A}
    for now in range(100):  # a long load
        accounts.sample([_engine("m", loading=True)], {"m": [A, B]}, now)
    assert accounts.users("m", "m", 100.5) == {A, B}
    assert not accounts.users("n", "n", 100.5)
    paid = dict(accounts.accounts)
    accounts.sample([_engine("m")], {}, 101)  # they pay although none of them has used it yet
    assert accounts.accounts == pytest.approx({key_id: had + 1 for key_id, had in paid.items()})
    accounts.sample([_engine("m")], {}, 100 + PRESENT_SECS)
    assert not accounts.users("m", "m", 100 + PRESENT_SECS)


def test_users_have_the_priority_of_their_key_although_they_never_waited() -> None:
    """As when their model was loaded for another key: a key of a lower priority does not displace it."""
    urgent = Caller("u", "u", priority=5)
    accounts = DeviceTime(lambda: EVER, caller_of={"u": urgent}.get)
    accounts.sample([_engine("m", {"u": 1})], {}, 0)
    assert accounts.users("m", "m", 0) == {urgent}


def test_what_is_stored_is_what_they_are() -> None:
    stored: list[Mapping[str, float]] = []
    accounts = DeviceTime(lambda: EVER, store=stored.append)
    for now in range(12):
        accounts.sample([_engine("m", {"a": 1})], {}, now)
    assert [round(each["a"]) for each in stored] == [0, 5, 10]


def test_the_claim_of_a_model_is_that_of_its_most_deserving_caller() -> None:
    urgent = Caller("u", "u", priority=1)
    used = {"a": 5.0, "b": 3.0, "u": 100.0}
    assert claim_of([A, B], used).caller == B
    assert claim_of([A, B, urgent], used).caller == urgent
    assert claim_of([ANONYMOUS, A], used).caller == A
    assert claim_of([], used).caller is None


@pytest.mark.parametrize(
    ("newcomers", "users", "used", "expected"),
    [
        ([A], [B], {}, 0),
        ([A], [], {"a": 1000.0}, 0),  # its users are gone
        ([A], [A], {"a": 1000.0}, 0),
        ([A, B], [B, A], {"a": 1000.0}, 0),
        ([ANONYMOUS], [ANONYMOUS], {}, 0),
        ([A], [B], {"b": 11.0}, 1),
        ([A], [B], {"b": 10.0}, 0),  # it would not pay for the swap
        ([A], [B], {"a": 11.0}, -1),
        ([A], [B, C], {"b": 19.0, "c": 19.0}, 0),  # twice as many would wait for the swap
        ([A], [B, C], {"b": 21.0, "c": 21.0}, 1),
        ([A], [B, C], {"a": 6.0}, -1),
        ([A], [B], {"a": 1000.0, "b": 1400.0}, 0),  # about the same
        ([A], [B], {"a": 1400.0, "b": 1000.0}, 0),
        ([A], [B], {"a": 1000.0, "b": 1600.0}, 1),
        ([ANONYMOUS], [A], {"a": 1000.0}, -1),
        ([A], [ANONYMOUS], {"a": 1000.0}, 1),
        ([Caller("p", "p", priority=1)], [A], {"p": 1000.0}, 1),
    ],
)
def test_who_may_displace_whom(
    newcomers: list[Caller], users: list[Caller], used: dict[str, float], expected: int
) -> None:
    """With 10 s for a swap."""
    assert advantage(newcomers, users, used, 10.0) == expected
