"""How long a model is not retried after a failure, on a manual clock."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cortex.control.backoff import MAX_TEMPORARY, Backoffs, Cause


class Clock:
    """A manual clock, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backoffs(clock: Clock) -> Backoffs:
    return Backoffs(clock)


def _pauses(backoffs: Backoffs, clock: Clock, causes: Iterable[Cause], node: str = "a") -> list[float]:
    """The length of the backoff after each failure, where it is tried again as soon as that allows."""
    found = []
    for cause in causes:
        backoffs.failed("m", node, cause, "no")
        until = max(backoff.until for backoff in backoffs.current().values())
        found.append(until - clock.now)
        clock.now = until
    return found


@pytest.mark.parametrize("cause", [Cause.NODE, Cause.MODEL, Cause.UNKNOWN])
def test_pauses_double_to_five_minutes(backoffs: Backoffs, clock: Clock, cause: Cause) -> None:
    """10 s, 20 s, ... 300 s, and 300 s from then on."""
    assert _pauses(backoffs, clock, [cause] * 8) == [10, 20, 40, 80, 160, 300, 300, 300]
    assert _pauses(backoffs, clock, [cause] * 2000)[-1] == 300


def test_the_nodes_fault_bars_the_node(backoffs: Backoffs) -> None:
    """And nothing else."""
    backoffs.failed("m", "a", Cause.NODE, "no memory")
    assert {key: (backoff.reason, backoff.temporary) for key, backoff in backoffs.current().items()} == {
        ("m", "a"): ("no memory", False)
    }


def test_the_models_fault_bars_it_everywhere(backoffs: Backoffs) -> None:
    """It would fail on every node."""
    backoffs.failed("m", "a", Cause.MODEL, "bad flag")
    assert list(backoffs.current()) == [("m", "*")]


def test_an_unknown_fault_is_tried_on_one_node_more(backoffs: Backoffs) -> None:
    """After that the model is considered at fault."""
    backoffs.failed("m", "a", Cause.UNKNOWN, "exit 1")
    assert list(backoffs.current()) == [("m", "a")]
    backoffs.failed("m", "b", Cause.UNKNOWN, "exit 1")
    assert set(backoffs.current()) == {("m", "a"), ("m", "*")}


@pytest.mark.parametrize("secs", [5, 60, 250])
def test_a_load_that_is_slow_to_fail_counts_all_the_same(backoffs: Backoffs, clock: Clock, secs: float) -> None:
    """The backoff of the first may have ended before the second fails."""
    backoffs.failed("m", "a", Cause.UNKNOWN, "exit 1")
    clock.now += secs
    backoffs.failed("m", "b", Cause.UNKNOWN, "exit 1")
    assert ("m", "*") in backoffs.current()


def test_an_unknown_fault_of_long_ago_is_no_second_one(backoffs: Backoffs, clock: Clock) -> None:
    """Nor is one that was another node's own, or another model's."""
    backoffs.failed("m", "a", Cause.UNKNOWN, "exit 1")
    clock.now += 3600
    backoffs.failed("m", "b", Cause.NODE, "no memory")
    backoffs.failed("x", "b", Cause.UNKNOWN, "exit 1")
    backoffs.failed("m", "c", Cause.UNKNOWN, "exit 1")
    assert set(backoffs.current()) == {("m", "b"), ("x", "b"), ("m", "c")}


def test_a_model_that_failed_everywhere_does_so_until_it_serves(backoffs: Backoffs, clock: Clock) -> None:
    """Tried again on a third node after its pause, it has not become innocent."""
    for node in "ab":
        backoffs.failed("m", node, Cause.UNKNOWN, "exit 1")
    clock.now += 10
    backoffs.failed("m", "c", Cause.UNKNOWN, "exit 1")
    assert backoffs.current()["m", "*"].until == clock.now + 20
    backoffs.succeeded("m", "c")
    assert ("m", "*") not in backoffs.current()


def test_what_passes_is_tried_again_soon_and_nobody_is_told(backoffs: Backoffs, clock: Clock) -> None:
    """A restart, a lost race: 1 s each. If it keeps failing, the node is at fault."""
    assert _pauses(backoffs, clock, [Cause.TEMPORARY] * MAX_TEMPORARY) == [1] * MAX_TEMPORARY
    backoffs.failed("m", "a", Cause.TEMPORARY, "again")
    (backoff,) = backoffs.current().values()
    assert (backoff.until - clock.now, backoff.temporary) == (10, False)


def test_what_passes_is_not_added_to_what_does_not(backoffs: Backoffs, clock: Clock) -> None:
    """Each is counted in a row of its own kind."""
    assert _pauses(backoffs, clock, [Cause.TEMPORARY, Cause.TEMPORARY, Cause.NODE]) == [1, 1, 10]


def test_bars_end_by_themselves(backoffs: Backoffs, clock: Clock) -> None:
    """At their time, not before."""
    backoffs.failed("m", "a", Cause.NODE, "no")
    clock.now += 9.9
    assert backoffs.current()
    clock.now += 0.1
    assert not backoffs.current()


def test_success_forgets(backoffs: Backoffs, clock: Clock) -> None:
    """On that node, and what was taken for the model's own fault; not what another node did."""
    for node in "ab":
        assert _pauses(backoffs, clock, [Cause.NODE] * 3, node) == [10, 20, 40]
    backoffs.failed("m", "a", Cause.MODEL, "no")
    backoffs.succeeded("m", "a")
    assert not backoffs.current()
    assert _pauses(backoffs, clock, [Cause.NODE]) == [10]
    assert _pauses(backoffs, clock, [Cause.NODE], "b") == [80]


def test_an_operator_lifts_what_bars_a_model(backoffs: Backoffs, clock: Clock) -> None:
    """At once and everywhere, only that model's; what fails again waits as long as it would have."""
    _pauses(backoffs, clock, [Cause.NODE] * 3)
    backoffs.failed("m", "b", Cause.MODEL, "no")
    backoffs.failed("x", "a", Cause.NODE, "no")
    backoffs.lift("m")
    assert list(backoffs.current()) == [("x", "a")]
    assert _pauses(backoffs, clock, [Cause.NODE]) == [80]


def test_what_passes_does_not_reset_the_pause() -> None:
    """A neuron that fails, restarts, and fails again has failed twice."""
    clock = Clock()
    backoffs = Backoffs(clock)
    backoffs.failed("m", "n", Cause.NODE, "no")
    clock.now += 11
    backoffs.failed("m", "n", Cause.TEMPORARY, "restarts")
    assert backoffs.current()["m", "n"].temporary
    clock.now += 2
    backoffs.failed("m", "n", Cause.NODE, "no")
    assert backoffs.current()["m", "n"].until == clock.now + 20
