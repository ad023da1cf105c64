"""What counts as use of a model."""

from __future__ import annotations

import pytest

from cortex.counts import Counts
from cortex.demand import Demand
from cortex.snapshot import FleetSnapshot, NodeSnapshot
from shared.protocol import ModelActivity, ModelView, NeuronHealth


def reported(**activity: int | None) -> FleetSnapshot:
    health = NeuronHealth(models=[ModelActivity(id="m", **activity)])
    models = {"m": ModelView(id="m", status="loaded")}
    return FleetSnapshot({"n": NodeSnapshot("n", "http://n", healthy=True, health=health, models=models)})


@pytest.mark.parametrize(
    ("before", "after", "used"),
    [
        ({"ended": 4}, {"ended": 4}, False),
        ({"ended": 4}, {"ended": 5}, True),  # begun and ended between two polls, by another cortex
        ({"ended": 4}, {"ended": 0}, False),  # the engine started again
        ({"ended": None}, {"ended": None}, False),  # a neuron that does not tell
        ({"ended": 4}, {"ended": 4, "in_flight": 1}, True),
        ({"ended": 4}, {"ended": 4, "queue_depth": 1}, True),
    ],
)
def test_what_engines_report_is_use(before: dict[str, int | None], after: dict[str, int | None], used: bool) -> None:
    """So that no cortex takes a model for idle which another one sends requests to."""
    now = 100.0
    demand = Demand(Counts(), clock=lambda: now)
    demand.routes_changed(["m"], reported(**before))
    demand.sample(reported(**before), replica_target=8)
    now = 200.0
    demand.sample(reported(**after), replica_target=8)
    assert (demand.uses()["m", "n"].last_used == 200.0) is used
