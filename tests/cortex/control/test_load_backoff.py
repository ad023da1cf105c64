"""How long a model is not retried after a failure, on a manual clock."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cortex.config.profile import RequestedModel
from cortex.control.load_backoff import MAX_TEMPORARY, QUIET_SECS, BackoffCause, Backoffs


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


def _pauses(backoffs: Backoffs, clock: Clock, causes: Iterable[BackoffCause], node: str = "a") -> list[float]:
    """The length of the backoff after each failure, where it is tried again as soon as that allows."""
    found = []
    for cause in causes:
        backoffs.record_failure("m", node, cause, "no")
        until = max(backoff.until for backoff in backoffs.current().values())
        found.append(until - clock.now)
        clock.now = until
    return found


@pytest.mark.parametrize("cause", [BackoffCause.NODE, BackoffCause.MODEL, BackoffCause.UNKNOWN])
def test_pauses_double_to_five_minutes(backoffs: Backoffs, clock: Clock, cause: BackoffCause) -> None:
    """Pauses are 10 s, 20 s, ... 300 s, and 300 s from then on."""
    assert _pauses(backoffs, clock, [cause] * 8) == [10, 20, 40, 80, 160, 300, 300, 300]
    assert _pauses(backoffs, clock, [cause] * 2000)[-1] == 300


def test_a_fault_of_the_node_backs_off_on_that_node(backoffs: Backoffs) -> None:
    """Other nodes and other models are not held back."""
    backoffs.record_failure("m", "a", BackoffCause.NODE, "no memory")
    assert {key: (backoff.reason, backoff.temporary) for key, backoff in backoffs.current().items()} == {
        ("m", "a"): ("no memory", False)
    }


def test_a_fault_of_the_model_backs_off_everywhere(backoffs: Backoffs) -> None:
    """It would fail on every node."""
    backoffs.record_failure("m", "a", BackoffCause.MODEL, "bad flag")
    assert list(backoffs.current()) == [("m", "*")]


def test_an_unknown_fault_is_tried_on_one_node_more(backoffs: Backoffs) -> None:
    """After a second node fails, the model is considered at fault."""
    backoffs.record_failure("m", "a", BackoffCause.UNKNOWN, "exit 1")
    assert list(backoffs.current()) == [("m", "a")]
    backoffs.record_failure("m", "b", BackoffCause.UNKNOWN, "exit 1")
    assert set(backoffs.current()) == {("m", "a"), ("m", "*")}


@pytest.mark.parametrize("secs", [5, 60, 250])
def test_a_failure_counts_after_the_first_backoff_ended(backoffs: Backoffs, clock: Clock, secs: float) -> None:
    """The backoff of the first may have ended before the second fails."""
    backoffs.record_failure("m", "a", BackoffCause.UNKNOWN, "exit 1")
    clock.now += secs
    backoffs.record_failure("m", "b", BackoffCause.UNKNOWN, "exit 1")
    assert ("m", "*") in backoffs.current()


def test_an_old_unknown_fault_does_not_count(backoffs: Backoffs, clock: Clock) -> None:
    """Failures count for all nodes only if recent, of unknown cause and of the same model."""
    backoffs.record_failure("m", "a", BackoffCause.UNKNOWN, "exit 1")
    clock.now += 3600
    backoffs.record_failure("m", "b", BackoffCause.NODE, "no memory")
    backoffs.record_failure("x", "b", BackoffCause.UNKNOWN, "exit 1")
    backoffs.record_failure("m", "c", BackoffCause.UNKNOWN, "exit 1")
    assert set(backoffs.current()) == {("m", "b"), ("x", "b"), ("m", "c")}


def test_a_backoff_for_all_nodes_lasts_until_the_model_serves(backoffs: Backoffs, clock: Clock) -> None:
    """A failure on a third node, after the pause, extends the backoff for all nodes."""
    for node in "ab":
        backoffs.record_failure("m", node, BackoffCause.UNKNOWN, "exit 1")
    clock.now += 10
    backoffs.record_failure("m", "c", BackoffCause.UNKNOWN, "exit 1")
    assert backoffs.current()["m", "*"].until == clock.now + 20
    backoffs.record_success(RequestedModel("m"), "c")
    assert ("m", "*") not in backoffs.current()


def test_a_temporary_failure_is_retried_soon_without_an_error(backoffs: Backoffs, clock: Clock) -> None:
    """A restart or a lost race pauses for 1 s. If it keeps failing, the node is at fault."""
    assert _pauses(backoffs, clock, [BackoffCause.TEMPORARY] * MAX_TEMPORARY) == [1] * MAX_TEMPORARY
    backoffs.record_failure("m", "a", BackoffCause.TEMPORARY, "again")
    (backoff,) = backoffs.current().values()
    assert (backoff.until - clock.now, backoff.temporary) == (10, False)


@pytest.mark.parametrize(("cause", "pauses"), [(BackoffCause.TEMPORARY, [1, 1]), (BackoffCause.NODE, [10, 20])])
def test_instances_that_fail_together_count_once(
    backoffs: Backoffs, clock: Clock, cause: BackoffCause, pauses: list[float]
) -> None:
    """Eight loads of one model meet the same restart of their neuron, or the same broken host."""
    for pause in pauses:
        for number in range(8):
            backoffs.record_failure("m", "a", cause, f"no {number}")
        backoff = backoffs.current()["m", "a"]
        assert (backoff.until - clock.now, backoff.reason) == (pause, "no 7")
        clock.now = backoff.until


def test_temporary_failures_do_not_count_with_others(backoffs: Backoffs, clock: Clock) -> None:
    """Temporary failures and others are counted separately."""
    assert _pauses(backoffs, clock, [BackoffCause.TEMPORARY, BackoffCause.TEMPORARY, BackoffCause.NODE]) == [1, 1, 10]


def test_load_backoffs_end_by_themselves(backoffs: Backoffs, clock: Clock) -> None:
    """A backoff ends exactly at its time."""
    backoffs.record_failure("m", "a", BackoffCause.NODE, "no")
    clock.now += 9.9
    assert backoffs.current()
    clock.now += 0.1
    assert not backoffs.current()


def test_a_success_resets_the_backoff(backoffs: Backoffs, clock: Clock) -> None:
    """A success also clears the backoff for all nodes, but not that of another node."""
    for node in "ab":
        assert _pauses(backoffs, clock, [BackoffCause.NODE] * 3, node) == [10, 20, 40]
    backoffs.record_failure("m", "a", BackoffCause.MODEL, "no")
    backoffs.record_success(RequestedModel("m"), "a")
    assert not backoffs.current()
    assert _pauses(backoffs, clock, [BackoffCause.NODE]) == [10]
    assert _pauses(backoffs, clock, [BackoffCause.NODE], "b") == [80]


@pytest.mark.parametrize("cause", list(BackoffCause))
@pytest.mark.parametrize("quiet_secs", [3600, 86400])
def test_pauses_are_short_again_after_a_quiet_time(
    backoffs: Backoffs, clock: Clock, cause: BackoffCause, quiet_secs: float
) -> None:
    """A model that failed yesterday has its first failure today; temporary failures are counted from zero too."""
    first = _pauses(backoffs, clock, [cause] * 7)
    clock.now += quiet_secs
    assert not backoffs.current()
    assert _pauses(backoffs, clock, [cause] * 7) == first


def test_a_load_that_takes_long_to_fail_does_not_count_as_quiet(backoffs: Backoffs, clock: Clock) -> None:
    """By default it may take half an hour."""
    pauses = []
    for _ in range(4):
        pauses += _pauses(backoffs, clock, [BackoffCause.NODE])
        clock.now += 1800
    assert pauses == [10, 20, 40, 80]


def test_old_failures_of_other_models_are_forgotten(backoffs: Backoffs, clock: Clock) -> None:
    """Clients may name any number of models."""
    for number in range(100):
        backoffs.record_failure(f"m{number}", "a", BackoffCause.NODE, "no")
    clock.now += QUIET_SECS
    backoffs.record_failure("m", "a", BackoffCause.NODE, "no")
    assert len(backoffs._failures) == 1


def test_a_load_of_another_cortex_does_not_count_as_a_failure(backoffs: Backoffs, clock: Clock) -> None:
    """It pauses for a moment, everywhere, and leaves the count as it was."""
    backoffs.record_load_elsewhere("m", "b")
    (backoff,) = backoffs.current().values()
    assert (backoff.temporary, backoff.until - clock.now) == (True, 1)
    clock.now += 1
    assert _pauses(backoffs, clock, [BackoffCause.MODEL]) == [10]
    backoffs.record_load_elsewhere("m", "b")
    clock.now += 1
    assert _pauses(backoffs, clock, [BackoffCause.MODEL]) == [20]


def test_a_load_that_gives_way_to_another_does_not_count_as_a_failure(backoffs: Backoffs, clock: Clock) -> None:
    """However often it does; it pauses on that node for a moment."""
    for _ in range(10):
        backoffs.record_failure("m", "a", BackoffCause.BUSY, "another engine starts there")
        ((key, backoff),) = backoffs.current().items()
        assert (key, backoff.temporary, backoff.until - clock.now) == (("m", "a"), True, 1)
        clock.now += 1
    assert _pauses(backoffs, clock, [BackoffCause.NODE]) == [10]


def test_an_operator_clears_the_backoffs_of_a_model(backoffs: Backoffs, clock: Clock) -> None:
    """All backoffs of that model end at once; if it fails again, the pause is as long as it would have been."""
    _pauses(backoffs, clock, [BackoffCause.NODE] * 3)
    backoffs.record_failure("m", "b", BackoffCause.MODEL, "no")
    backoffs.record_failure("x", "a", BackoffCause.NODE, "no")
    backoffs.clear("m")
    assert list(backoffs.current()) == [("x", "a")]
    assert _pauses(backoffs, clock, [BackoffCause.NODE]) == [80]


def test_a_temporary_failure_does_not_reset_the_pause() -> None:
    """A neuron that fails, restarts, and fails again has failed twice."""
    clock = Clock()
    backoffs = Backoffs(clock)
    backoffs.record_failure("m", "n", BackoffCause.NODE, "no")
    clock.now += 11
    backoffs.record_failure("m", "n", BackoffCause.TEMPORARY, "restarts")
    assert backoffs.current()["m", "n"].temporary
    clock.now += 2
    backoffs.record_failure("m", "n", BackoffCause.NODE, "no")
    assert backoffs.current()["m", "n"].until == clock.now + 20
