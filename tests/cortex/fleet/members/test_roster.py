"""The decisions about found neurons: who is in the fleet, and under which name."""

from __future__ import annotations

from dataclasses import replace

from cortex.config.neurons import NeuronEntry
from cortex.fleet.members.roster import (
    Addresses,
    FoundAddress,
    Registered,
    after_answers,
    after_lookup,
    combined,
    name_of,
    named,
    registered_until,
    registration_refusal,
    to_ask,
)
from shared.protocol import Discovery, Registration
from tests.cortex.fleets import node

A, B = "http://10.0.0.1:13131", "http://10.0.0.2:13131"


def entry(name: str, endpoint: str) -> NeuronEntry:
    return NeuronEntry(name=name, endpoint=endpoint)


def looked_up(known: Addresses, *endpoints: str, now: float) -> Addresses:
    return after_lookup(known, endpoints, now=now, grace_secs=60)


def said(name: str, process: str) -> Discovery:
    return Discovery(name=name, instance_id=process)


def test_a_listed_neuron_keeps_its_name() -> None:
    """A found one with the same name is left out, and the operator is told; the same endpoint is the same neuron."""
    entries, clashes = combined([entry("a", A)], [entry("a", B), entry("b", B)])
    assert {name: each.endpoint for name, each in entries.items()} == {"a": A, "b": B}
    assert len(clashes) == 1
    assert A in clashes[0]
    assert B in clashes[0]
    assert combined([entry("a", A)], [entry("a", A)])[1] == []


def test_a_listed_neuron_is_not_found_under_another_name() -> None:
    """Its GPUs would count twice."""
    entries, (clash,) = combined([entry("gpu-1", A)], [entry("node1", A), entry("node2", B)])
    assert {name: each.endpoint for name, each in entries.items()} == {"gpu-1": A, "node2": B}
    assert "gpu-1" in clash
    assert "node1" in clash


def test_an_address_stays_for_the_grace_period() -> None:
    """DNS may drop an address for a moment. Without an answer of DNS nothing is known to be gone."""
    known = looked_up({}, A, B, now=0)
    assert list(looked_up(known, A, now=59)) == [A, B]
    assert list(looked_up(known, A, now=60)) == [A]
    silent = after_lookup(known, None, now=500, grace_secs=60)
    assert list(looked_up(silent, A, now=559)) == [A, B]


def test_a_neuron_that_has_moved_stays_there_while_dns_is_silent() -> None:
    """The old address, which only waits for the end of its grace period, does not become as good as the new one."""
    known = after_answers(looked_up({}, A, now=0), {A: said("beast", "1")})
    known = after_answers(looked_up(known, B, now=10), {B: said("beast", "2")})
    for now in (20, 30):
        known = after_lookup(known, None, now=now, grace_secs=60)
        chosen, clashes = named(known)
        assert [each.endpoint for each in chosen] == [B]
        assert clashes == []


def test_an_address_that_comes_back_has_to_say_its_name_again() -> None:
    """Another host may have it now. Until it has answered it keeps its name, unless another neuron has it meanwhile."""
    known = after_answers(looked_up({}, A, now=0), {A: said("beast", "1")})
    known = after_answers(looked_up(known, B, now=10), {B: said("beast", "2")})
    known = looked_up(known, A, B, now=20)
    assert to_ask(known, {}) == [A]
    chosen, clashes = named(known)
    assert [each.endpoint for each in chosen] == [B]
    assert clashes == []
    known = after_answers(known, {A: said("benjy", "3")})
    assert to_ask(known, {}) == []
    assert {each.name: each.endpoint for each in named(known)[0]} == {"benjy": A, "beast": B}


def test_names_come_from_the_neurons() -> None:
    """An address has no name before its neuron has answered. A name that cortex could not use is not taken."""
    known = looked_up({}, A, B, now=0)
    assert to_ask(known, {}) == [A, B]
    known = after_answers(known, {A: said("beast", "1")})
    assert to_ask(known, {}) == [B]
    assert [(each.name, each.endpoint) for each in named(known)[0]] == [("beast", A)]
    assert name_of(Discovery(name="no name", hostname="gpu1"), A) == "gpu1"
    assert name_of(Discovery(), A) == "10.0.0.1-13131"
    assert name_of(Discovery(), "http://[fe80::1]:13131") == "fe80--1--13131"


def test_an_address_that_another_process_has_is_asked_again() -> None:
    """Clusters give an address to another host later, which has another name."""
    known = after_answers(looked_up({}, A, now=0), {A: said("beast", "1")})
    beast = replace(node("beast"), endpoint=A, discovery=said("beast", "1"))
    assert to_ask(known, {"beast": beast}) == []
    assert to_ask(known, {"beast": replace(beast, discovery=said("benjy", "2"))}) == [A]
    assert to_ask(known, {"beast": replace(beast, endpoint=B, discovery=said("beast", "2"))}) == []


def test_two_addresses_with_one_name() -> None:
    """Of one process: the same neuron. Of two: the one that DNS still has, else the first, and the operator is told."""
    both = {A: FoundAddress(A, 5, "beast", "1"), B: FoundAddress(B, 5, "beast", "1")}
    assert named(both) == ([both[A]], [])
    moved = {A: replace(both[A], seen_at=4), B: replace(both[B], process="2")}
    assert named(moved) == ([moved[B]], [])
    two = {A: both[A], B: replace(both[B], process="2")}
    chosen, clashes = named(two)
    assert chosen == [two[A]]
    assert len(clashes) == 1


def test_a_name_belongs_to_the_neuron_that_answers() -> None:
    """The same neuron may come back at another address; another one gets the name once the first is down."""
    first = Registered(entry("a", A), "1", expires_at=35)
    wanted = Registration(name="a", endpoint=B, instance_id="2")

    def refusal(wanted: Registration, *, healthy: bool = True, listed: str | None = None) -> str | None:
        entries = {} if listed is None else {"a": entry("a", listed)}
        known = node("a", healthy=healthy)
        return registration_refusal(wanted, listed=entries, registered={"a": first}, node=known)

    assert A in (refusal(wanted) or "")
    assert refusal(wanted, healthy=False) is None
    assert refusal(wanted.model_copy(update={"endpoint": A})) is None
    assert refusal(wanted.model_copy(update={"instance_id": "1"})) is None
    assert "cortex.toml" in (refusal(wanted, healthy=False, listed=A) or "")
    assert refusal(wanted, listed=B) is None


def test_a_registration_outlives_two_missed_announcements() -> None:
    """It ends after the third one has not come, a little later than it was due."""
    due = registered_until(Registration(name="a", endpoint=A, interval_secs=10), now=100)
    assert 130 < due < 140
