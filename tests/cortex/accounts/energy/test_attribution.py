"""Sharing an engine's energy among its requests."""

from __future__ import annotations

import random

import pytest

from cortex.accounts.energy.attribution import (
    EnergySlice,
    ServedRequest,
    parts_by_hour,
    shares,
    work_of,
)


def slice_of(start: float, end: float, *, active: float, resident: float) -> EnergySlice:
    return EnergySlice("n", "0", "m", "1", start, end, active, resident)


def request(name: str, start: float, end: float, work: float | None = None) -> ServedRequest:
    return ServedRequest(name, end, start, "k", "m", work)


def by_name(energy: EnergySlice, *requests: ServedRequest) -> dict[str, float]:
    """Wh by request, "" for the rest."""
    return {"" if each.request is None else each.request.request_id: each.wh for each in shares(energy, requests)}


def test_an_engine_without_requests() -> None:
    """All of it is for no request, what neuron took for active included: it was used past cortex."""
    assert by_name(slice_of(0, 10, active=1, resident=2), request("before", -5, 0), request("after", 10, 12)) == {"": 3}


def test_idle_draw_by_time() -> None:
    """A request gets what was used for requests, and the idle draw of its time. Overlapping time counts once."""
    energy = slice_of(0, 10, active=1, resident=2)
    assert by_name(energy, request("a", 2, 7)) == pytest.approx({"a": 2, "": 1})
    assert by_name(energy, request("a", 2, 6), request("b", 3, 7)) == pytest.approx({"a": 1, "b": 1, "": 1})
    assert by_name(energy, request("a", -5, 15)) == pytest.approx({"a": 3})


def test_concurrent_requests_by_work() -> None:
    """A request that generates three times as many tokens in the same time gets three times as much; by time alone if
    one of them is unknown."""
    energy = slice_of(0, 10, active=4, resident=0)
    assert by_name(energy, request("a", 0, 10, 300), request("b", 0, 10, 100)) == pytest.approx({"a": 3, "b": 1})
    assert by_name(energy, request("a", 0, 20, 300), request("b", 0, 10, 50)) == pytest.approx({"a": 3, "b": 1})
    assert by_name(energy, request("a", 0, 10, 300), request("b", 0, 10)) == pytest.approx({"a": 2, "b": 2})


def test_work() -> None:
    """Prompts count less than answers, and what is in the cache not at all. Without any token it is unknown."""
    assert work_of(100, 50, 10) == pytest.approx(20)
    assert work_of(100, None, None) == pytest.approx(20)
    assert work_of(None, None, None) is None
    assert work_of(0, 0, 0) is None


def test_hours() -> None:
    """What was used over a full hour is in both hours."""
    assert list(parts_by_hour(3590, 3610)) == [(3590, 3600, 0.5), (3600, 3610, 0.5)]
    assert list(parts_by_hour(3600, 3610)) == [(3600, 3610, 1)]
    parts = list(parts_by_hour(100, 20_000))
    assert len(parts) == 6
    assert sum(part for _, _, part in parts) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_add_up(seed: int) -> None:
    """Whatever runs: no part is negative, and their sum is the slice's energy."""
    dice = random.Random(seed)
    for _ in range(50):
        energy = slice_of(100, 100 + dice.uniform(0.01, 20), active=dice.random(), resident=dice.random())
        starts = [dice.uniform(90, 120) for _ in range(dice.randrange(6))]
        requests = [
            request(str(number), start, start + dice.uniform(0, 30), dice.choice([None, 1.0, 500.0]))
            for number, start in enumerate(starts)
        ]
        found = shares(energy, requests)
        assert sum(each.wh for each in found) == pytest.approx(energy.wh)
        assert min(each.wh for each in found) >= 0
