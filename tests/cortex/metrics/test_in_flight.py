"""Counts of requests at engines."""

from __future__ import annotations

from cortex.metrics.in_flight import CallerCount, InFlight
from tests.cortex.fleets import replica_key

KEY = replica_key("org/m", "benjy")


def test_callers_are_forgotten_once_their_requests_have_ended_and_were_taken() -> None:
    """Or the counts of every key at every engine that there ever was would remain."""
    counts = InFlight()
    for key_id in ("a", "a", "b"):
        counts.add(KEY, key_id)
    counts.remove(KEY, "b")
    assert counts.take_callers() == {(KEY, "a"): CallerCount(2, 2), (KEY, "b"): CallerCount(0, 1)}
    counts.remove(KEY, "a")
    counts.add(KEY, "b")
    assert counts.take_callers() == {(KEY, "a"): CallerCount(1, 0), (KEY, "b"): CallerCount(1, 1)}
    for key_id in ("a", "b"):
        counts.remove(KEY, key_id)
    assert set(counts.take_callers().values()) == {CallerCount(0, 0)}
    assert counts.take_callers() == {}
