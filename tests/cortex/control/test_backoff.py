"""How long a model is not retried after a failure, on a manual clock."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cortex.control.backoff import MAX_PASSING, Backoffs, Cause


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
def bars(clock: Clock) -> Backoffs:
    return Backoffs(clock)


def _pauses(bars: Backoffs, clock: Clock, causes: Iterable[Cause], node: str = "a") -> list[float]:
    """The length of the bar after each failure, where it is tried again as soon as that allows."""
    found = []
    for cause in causes:
        bars.failed("m", node, cause, "no")
        until = max(bar.until for bar in bars.current().values())
        found.append(until - clock.now)
        clock.now = until
    return found


@pytest.mark.parametrize("cause", [Cause.NODE, Cause.MODEL, Cause.UNKNOWN])
def test_pauses_double_to_five_minutes(bars: Backoffs, clock: Clock, cause: Cause) -> None:
    """10 s, 20 s, ... 300 s, and 300 s from then on."""
    assert _pauses(bars, clock, [cause] * 8) == [10, 20, 40, 80, 160, 300, 300, 300]
    assert _pauses(bars, clock, [cause] * 2000)[-1] == 300


def test_the_nodes_fault_bars_the_node(bars: Backoffs) -> None:
    """And nothing else."""
    bars.failed("m", "a", Cause.NODE, "no memory")
    assert {key: (bar.reason, bar.passes) for key, bar in bars.current().items()} == {("m", "a"): ("no memory", False)}


def test_the_models_fault_bars_it_everywhere(bars: Backoffs) -> None:
    """It would fail on every node."""
    bars.failed("m", "a", Cause.MODEL, "bad flag")
    assert list(bars.current()) == [("m", "*")]


def test_an_unknown_fault_is_tried_on_one_node_more(bars: Backoffs) -> None:
    """After that the model is considered at fault."""
    bars.failed("m", "a", Cause.UNKNOWN, "exit 1")
    assert list(bars.current()) == [("m", "a")]
    bars.failed("m", "b", Cause.UNKNOWN, "exit 1")
    assert set(bars.current()) == {("m", "a"), ("m", "*")}


@pytest.mark.parametrize("secs", [5, 60, 250])
def test_a_load_that_is_slow_to_fail_counts_all_the_same(bars: Backoffs, clock: Clock, secs: float) -> None:
    """The bar of the first may have ended before the second fails."""
    bars.failed("m", "a", Cause.UNKNOWN, "exit 1")
    clock.now += secs
    bars.failed("m", "b", Cause.UNKNOWN, "exit 1")
    assert ("m", "*") in bars.current()


def test_an_unknown_fault_of_long_ago_is_no_second_one(bars: Backoffs, clock: Clock) -> None:
    """Nor is one that was another node's own, or another model's."""
    bars.failed("m", "a", Cause.UNKNOWN, "exit 1")
    clock.now += 3600
    bars.failed("m", "b", Cause.NODE, "no memory")
    bars.failed("x", "b", Cause.UNKNOWN, "exit 1")
    bars.failed("m", "c", Cause.UNKNOWN, "exit 1")
    assert set(bars.current()) == {("m", "b"), ("x", "b"), ("m", "c")}


def test_a_model_that_failed_everywhere_does_so_until_it_serves(bars: Backoffs, clock: Clock) -> None:
    """Tried again on a third node after its pause, it has not become innocent."""
    for node in "ab":
        bars.failed("m", node, Cause.UNKNOWN, "exit 1")
    clock.now += 10
    bars.failed("m", "c", Cause.UNKNOWN, "exit 1")
    assert bars.current()["m", "*"].until == clock.now + 20
    bars.succeeded("m", "c")
    assert ("m", "*") not in bars.current()


def test_what_passes_is_tried_again_soon_and_nobody_is_told(bars: Backoffs, clock: Clock) -> None:
    """A restart, a lost race: 1 s each. If it keeps failing, the node is at fault."""
    assert _pauses(bars, clock, [Cause.PASSING] * MAX_PASSING) == [1] * MAX_PASSING
    bars.failed("m", "a", Cause.PASSING, "again")
    (bar,) = bars.current().values()
    assert (bar.until - clock.now, bar.passes) == (10, False)


def test_what_passes_is_not_added_to_what_does_not(bars: Backoffs, clock: Clock) -> None:
    """Each is counted in a row of its own kind."""
    assert _pauses(bars, clock, [Cause.PASSING, Cause.PASSING, Cause.NODE]) == [1, 1, 10]


def test_bars_end_by_themselves(bars: Backoffs, clock: Clock) -> None:
    """At their time, not before."""
    bars.failed("m", "a", Cause.NODE, "no")
    clock.now += 9.9
    assert bars.current()
    clock.now += 0.1
    assert not bars.current()


def test_success_forgets(bars: Backoffs, clock: Clock) -> None:
    """On that node, and what was taken for the model's own fault; not what another node did."""
    for node in "ab":
        assert _pauses(bars, clock, [Cause.NODE] * 3, node) == [10, 20, 40]
    bars.failed("m", "a", Cause.MODEL, "no")
    bars.succeeded("m", "a")
    assert not bars.current()
    assert _pauses(bars, clock, [Cause.NODE]) == [10]
    assert _pauses(bars, clock, [Cause.NODE], "b") == [80]


def test_an_operator_lifts_what_bars_a_model(bars: Backoffs, clock: Clock) -> None:
    """At once and everywhere, only that model's; what fails again waits as long as it would have."""
    _pauses(bars, clock, [Cause.NODE] * 3)
    bars.failed("m", "b", Cause.MODEL, "no")
    bars.failed("x", "a", Cause.NODE, "no")
    bars.lift("m")
    assert list(bars.current()) == [("x", "a")]
    assert _pauses(bars, clock, [Cause.NODE]) == [80]


def test_what_passes_does_not_reset_the_pause() -> None:
    """A neuron that fails, restarts, and fails again has failed twice."""
    clock = Clock()
    bars = Backoffs(clock)
    bars.failed("m", "n", Cause.NODE, "no")
    clock.now += 11
    bars.failed("m", "n", Cause.PASSING, "restarts")
    assert bars.current()["m", "n"].passes
    clock.now += 2
    bars.failed("m", "n", Cause.NODE, "no")
    assert bars.current()["m", "n"].until == clock.now + 20
