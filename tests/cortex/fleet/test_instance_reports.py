"""What the fleet knows of a neuron's instances, from polls and events in any order."""

from __future__ import annotations

import random

import pytest

from cortex.fleet.snapshot import by_instance, instance_of
from cortex.fleet.state import Fleet
from cortex.routing.replica import ReplicaKey
from shared.protocol import Discovery, ModelView, NeuronHealth

NAMES = ["0", "1", "2"]
MODELS = ["a", "b"]


def entry(model_id: str, instance: str | None, status: str = "loaded", **fields: object) -> ModelView:
    return ModelView.model_validate({"id": model_id, "instance": instance, "status": status, **fields})


def fleet_at(now: list[float]) -> Fleet:
    return Fleet([("n", "http://n")], unhealthy_after=3, clock=lambda: now[0])


def poll(fleet: Fleet, started: float, *views: ModelView) -> None:
    discovery = Discovery(instance_id="n-1", instances=True)
    fleet.record_poll("n", started=started, health=NeuronHealth(), models=views, discovery=discovery)


def known(fleet: Fleet) -> dict[tuple[str, str], str]:
    return {(view.id, instance_of(view)): view.status for view in fleet.node("n").views}


@pytest.mark.parametrize("seed", range(200))
def test_the_newest_report_of_each_instance_rules(seed: int) -> None:
    """Polls arrive late and in any order relative to events. After each report the fleet knows for every instance what
    the report with the latest moment said: a poll's moment is its start, an event's its arrival."""
    rng, now = random.Random(seed), [100.0]
    fleet = fleet_at(now)
    poll(fleet, 99.0)
    truth: dict[tuple[str, str], tuple[float, str | None]] = {}  # the moment and the status, None: not listed
    polled_at = 99.0
    for _ in range(40):
        now[0] += rng.random()
        if rng.random() < 0.5:
            name = rng.choice(MODELS), rng.choice(NAMES)
            if rng.random() < 0.2:
                fleet.remove_model("n", *name)
                truth[name] = now[0], None
            else:
                status = rng.choice(["loading", "loaded", "failed"])
                fleet.update_model("n", entry(*name, status))
                truth[name] = now[0], status
        else:
            started = polled_at = max(polled_at, now[0] - 2 * rng.random())
            listed = {
                (model_id, name): rng.choice(["loading", "loaded", "sleeping"])
                for model_id in MODELS
                for name in NAMES
                if rng.random() < 0.5
            }
            poll(fleet, started, *(entry(*name, status) for name, status in listed.items()))
            for name in {*truth, *listed}:
                if truth.get(name, (0.0, None))[0] <= started:
                    truth[name] = started, listed.get(name)
        assert known(fleet) == {name: status for name, (_, status) in truth.items() if status is not None}
        node = fleet.node("n")
        assert node.models == by_instance(node.views)
        assert all(node.models.values()), "a model without engines is not listed"
        assert {model_id for model_id, _ in known(fleet)} == set(fleet.snapshot().listed_models)


def test_a_load_names_its_instance() -> None:
    """The others of the model keep their state; a poll from before the load does not undo it."""
    now = [10.0]
    fleet = fleet_at(now)
    poll(fleet, 1.0, entry("m", "0"), entry("m", "1", "loading"))
    fleet.loaded(ReplicaKey("m", "n", "1"), harness="sim", devices=[1])
    poll(fleet, 9.0, entry("m", "0", "failed"), entry("m", "1", "loading"))
    assert known(fleet) == {("m", "0"): "failed", ("m", "1"): "loaded"}
    assert [engine.instance for engine in fleet.snapshot().serving("m")] == ["1"]


def test_removing_a_model_removes_all_its_instances() -> None:
    """A neuron that knows no instances names none."""
    fleet = fleet_at([10.0])
    poll(fleet, 1.0, entry("m", "0"), entry("m", "1"), entry("o", "0"))
    fleet.remove_model("n", "m")
    assert known(fleet) == {("o", "0"): "loaded"}
    assert not fleet.snapshot().holders("m")


def test_followers_are_told_about_each_instance() -> None:
    """An instance that comes, goes or fails may change where requests go; one that stays as it is does not."""
    fleet = fleet_at([10.0])
    heard: list[set[str]] = []
    fleet.route_changes.subscribe(lambda models: heard.append(set(models)))
    poll(fleet, 1.0, entry("m", "0", since=1.0))
    for views in (
        [entry("m", "0", since=1.0), entry("m", "1", since=2.0)],
        [entry("m", "0", since=1.0), entry("m", "1", "failed", since=3.0)],
        [entry("m", "0", since=1.0)],
    ):
        heard.clear()
        poll(fleet, 2.0, *views)
        assert heard == [{"m"}]
        heard.clear()
        poll(fleet, 2.0, *(view.model_copy() for view in views))
        assert not heard


def test_a_busy_neighbour_does_not_hide_an_eviction() -> None:
    """Only the evicted instance gets no requests."""
    fleet = fleet_at([10.0])
    poll(fleet, 1.0, entry("m", "0"), entry("m", "1"))
    key = ReplicaKey("m", "n", "0")
    fleet.begin_eviction(key)
    assert [engine.key for engine in fleet.snapshot().serving("m")] == [ReplicaKey("m", "n", "1")]
    fleet.end_eviction(key)
    assert len(fleet.snapshot().serving("m")) == 2


def test_names_keep_conversations_where_they_are() -> None:
    """A neuron's only engine keeps its name when the neuron learns of instances."""
    assert [ReplicaKey("m", "n", instance).name for instance in ("", "0", "1", "blue")] == ["n", "n", "n#1", "n#blue"]
