"""Leases on loads, on a manual clock, and over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from neuron.api import leases
from neuron.api.leases import REMEMBERED_SECS, LeaseTable
from shared.errors import Unavailable
from shared.protocol import LEASE_SECS, LeaseCommand, LeaseReply
from tests.neuron.neurons import Neuron


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> LeaseTable:
    return LeaseTable(clock)


def asked(table: LeaseTable, holder: str, node: str | None, model: str = "m") -> tuple[bool, str | None]:
    reply = table.apply(LeaseCommand(model_id=model, holder=holder, node=node))
    return reply.granted, reply.node


def test_the_first_gets_the_lease_and_others_learn_where_it_loads(table: LeaseTable) -> None:
    """A lease is of one model; its holder may renew it, for another neuron too."""
    assert asked(table, "one", "a") == (True, None)
    assert asked(table, "two", "b") == (False, "a")
    assert asked(table, "two", "b", "other") == (True, None)
    assert asked(table, "one", "c") == (True, None)
    assert asked(table, "two", "b") == (False, "c")


def test_one_lease_is_for_loads_on_several_neurons(table: LeaseTable) -> None:
    """The next holder learns of all of them, the latest first, and of none of an earlier lease."""
    for node in "abac":
        assert asked(table, "one", node) == (True, None)
    two = LeaseCommand(model_id="m", holder="two", node="d")
    assert table.apply(two) == LeaseReply(granted=False, node="c", nodes=["c", "a", "b"])
    asked(table, "one", None)
    assert table.apply(two) == LeaseReply(granted=True, node="c", nodes=["c", "a", "b"])
    asked(table, "two", None)
    asked(table, "one", "e")
    assert table.apply(two) == LeaseReply(granted=False, node="e", nodes=["e"])


def test_a_lease_remembers_a_bounded_number_of_neurons(table: LeaseTable) -> None:
    """The latest."""
    for number in range(leases.MAX_NODES + 2):
        asked(table, "one", f"n{number}")
    nodes = table.apply(LeaseCommand(model_id="m", holder="two", node="x")).nodes
    assert (len(nodes), nodes[-1]) == (leases.MAX_NODES, "n2")


def test_a_lease_ends_with_its_time_unless_it_is_renewed(table: LeaseTable, clock: Clock) -> None:
    """The holder may have died."""
    asked(table, "one", "a")
    clock.now += LEASE_SECS - 1
    asked(table, "one", "a")
    clock.now += LEASE_SECS - 1
    assert asked(table, "two", "b") == (False, "a")
    clock.now += 1
    assert asked(table, "two", "b") == (True, "a")


def test_the_next_holder_learns_where_the_last_one_loaded(table: LeaseTable, clock: Clock) -> None:
    """For a while: then it has heard of that load in other ways."""
    asked(table, "one", "a")
    assert asked(table, "two", None) == (False, None)  # not its lease
    assert asked(table, "two", "b") == (False, "a")
    asked(table, "one", None)
    assert asked(table, "two", "b") == (True, "a")
    asked(table, "two", None)
    clock.now += REMEMBERED_SECS
    assert asked(table, "one", "a") == (True, None)


def test_the_number_of_leases_is_bounded(table: LeaseTable, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have ended are forgotten first."""
    monkeypatch.setattr(leases, "MAX_LEASES", 2)
    for model in "ab":
        asked(table, "one", "n", model)
    with pytest.raises(Unavailable):
        asked(table, "one", "n", "c")
    clock.now += LEASE_SECS + REMEMBERED_SECS
    assert asked(table, "one", "n", "c") == (True, None)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model_id": "m", "holder": "one", "node": "a"}, 200),
        ({"model_id": "m", "holder": "one"}, 200),
        ({"model_id": "m", "holder": "", "node": "a"}, 400),
        ({"model_id": "m", "node": "a"}, 400),
        ({"model_id": "m", "holder": "one", "node": "a" * 300}, 400),
    ],
)
async def test_the_route(neuron: Neuron, body: dict[str, Any], status: int) -> None:
    answer = await neuron.call("POST", "/models/lease", json=body)
    assert answer.status == status
    if status == 200:
        assert LeaseReply.model_validate(answer.body).granted is ("node" in body)
