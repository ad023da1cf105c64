"""Whose request gets the next place of a saturated model."""

from __future__ import annotations

import random
from collections import Counter

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.fairness.turns import Turns


def _caller(name: str, *, priority: int = 0, weight: float = 1.0) -> Caller:
    return Caller(name, name, priority=priority, weight=weight)


def _serve(turns: Turns[str], count: int = 1) -> list[str]:
    """The next requests, each served before the next one is called."""
    served = []
    for _ in range(count):
        item = turns.call()
        assert item is not None
        turns.remove(item, served=True)
        served.append(item)
    return served


def _add(turns: Turns[str], caller: Caller, *numbers: int, tokens: float = 10) -> None:
    for number in numbers:
        turns.add(f"{caller.name}{number}", caller, tokens)


def test_a_single_request_does_not_wait_for_a_thousand_of_another_key() -> None:
    """It is next, however many of the other key arrived before it."""
    turns, busy, quiet = Turns[str](), _caller("busy"), _caller("quiet")
    _add(turns, busy, *range(1000))
    assert _serve(turns, 3) == ["busy0", "busy1", "busy2"]
    _add(turns, quiet, 0)
    assert "quiet0" in _serve(turns, 2)


def test_an_idle_key_gets_no_credit() -> None:
    """One key was served a hundred times while the other was idle: then they alternate."""
    turns, first, second = Turns[str](), _caller("a"), _caller("b")
    _add(turns, first, *range(200))
    _ = _serve(turns, 100)
    _add(turns, second, *range(100))
    assert Counter(item[0] for item in _serve(turns, 20)) == {"a": 10, "b": 10}


def test_shares_follow_tokens_and_weights() -> None:
    """A key with half the weight gets half the tokens, whatever the size of its requests."""
    turns, heavy, light = Turns[str](), _caller("h", weight=2), _caller("l", weight=1)
    _add(turns, heavy, *range(400), tokens=10)
    _add(turns, light, *range(400), tokens=40)
    served = Counter(item[0] for item in _serve(turns, 180))
    assert abs(served["h"] * 10 - 2 * served["l"] * 40) <= 2 * 40


def test_priorities_come_before_shares_and_anonymous_callers_last() -> None:
    """Anonymous callers get what keys leave, even keys of a negative priority."""
    turns = Turns[str]()
    low, high = _caller("low", priority=-1), _caller("high", priority=3)
    for number in range(2):
        turns.add(f"anonymous{number}", ANONYMOUS, 1)
        _add(turns, low, number)
        _add(turns, high, number)
    assert _serve(turns, 6) == ["high0", "high1", "low0", "low1", "anonymous0", "anonymous1"]


def test_keys_without_usage_are_served_in_order_of_arrival() -> None:
    """Nothing else tells them apart."""
    turns = Turns[str]()
    names = [f"k{number}-" for number in range(20)]
    random.Random(1).shuffle(names)
    for name in names:
        _add(turns, _caller(name), 0)
    assert _serve(turns, 20) == [f"{name}0" for name in names]


def test_the_requests_of_one_caller_keep_their_order() -> None:
    """With one key or none: first come, first served, also when requests are called, put back or leave."""
    for caller in (ANONYMOUS, _caller("k")):
        turns, chance = Turns[int](), random.Random(7)
        waiting: list[int] = []
        called: set[int] = set()
        for number in range(3000):
            turns.add(number, caller, chance.choice([0, 1, 1000]))
            waiting.append(number)
            while chance.random() < 0.55 and waiting:
                item = chance.choice(waiting)
                match chance.randrange(3):
                    case 0:
                        expected = next((each for each in waiting if each not in called), None)
                        assert turns.call() == expected
                        called |= set() if expected is None else {expected}
                    case 1 if item in called:
                        turns.put_back(item)
                        called.discard(item)
                    case _:
                        turns.remove(item, served=chance.random() < 0.5)
                        waiting.remove(item)
                        called.discard(item)
        assert list(turns) == waiting


def test_several_places_at_once_go_to_several_keys() -> None:
    """Those that have been called count as served before they are."""
    turns = Turns[str]()
    for name in "abc":
        _add(turns, _caller(name), 0, 1)
    assert [turns.call() for _ in range(6)] == ["a0", "b0", "c0", "a1", "b1", "c1"]
    assert turns.call() is None
    turns.put_back("b0")
    assert turns.call() == "b0"


def test_what_a_key_has_used_counts_although_the_queue_was_empty_meanwhile() -> None:
    """Two keys take turns at a model with one place even if there is never more than one request behind it."""
    turns, first, second = Turns[str](), _caller("a"), _caller("b")
    _add(turns, first, 0, tokens=100)
    assert _serve(turns) == ["a0"]
    assert turns.owed
    _add(turns, first, 1)
    _add(turns, second, 1)
    assert _serve(turns, 2) == ["b1", "a1"]


def test_requests_that_leave_cost_nothing() -> None:
    """A key whose clients gave up a thousand requests is treated like one that sent none."""
    turns, first, second = Turns[str](), _caller("a"), _caller("b")
    _add(turns, first, *range(1000))
    for number in range(1000):
        turns.remove(f"a{number}", served=False)
    assert not turns.owed
    _add(turns, first, 0)
    _add(turns, second, 0)
    assert _serve(turns, 2) == ["a0", "b0"]


def test_a_caller_has_one_account_for_all_lines() -> None:
    """A place that requests of both lines may take goes to the caller that has used less; of one line, only to that."""
    turns, busy, quiet = Turns[str](), _caller("busy"), _caller("quiet")
    for number in range(100):
        turns.add(f"busy{number}", busy, 10, "m")
    assert turns.call("m@awq") is None
    turns.add("quiet0", quiet, 10, "m@awq")
    turns.add("busy100", busy, 10, "m@awq")
    assert (set(turns.callers("m")), set(turns.callers("m@awq"))) == ({busy}, {busy, quiet})
    assert [turns.call("m", "m@awq") for _ in range(3)] == ["busy0", "quiet0", "busy1"]
    for item in ("busy0", "quiet0", "busy1"):
        turns.remove(item, served=True)
    turns.add("quiet1", quiet, 10, "m")
    assert [turns.call("m@awq"), turns.call("m@awq"), turns.call("m")] == ["busy100", None, "quiet1"]
    turns.put_back("busy100")
    assert turns.call("m@awq") == "busy100"
