"""What a waiting client is told, and which replicas a failed request may still try."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex.control.loads.loader import LoadJob
from cortex.control.wait_note import leaving_text, waiting_note
from cortex.fleet.snapshot import by_instance
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.routing.replica import Failure, FailureKind, WaitNote, given_up, untried, untried_first
from shared.protocol import ModelView, Progress
from tests.cortex.fleets import BEAST, BENJY, fleet, replica, replica_key

MODEL = "org/m"


def told(status: str, progress: Progress | None = None, *, loading: bool = False, healthy: bool = True) -> WaitNote:
    """The note while beast lists the model with these fields."""
    view = ModelView(id=MODEL, status=status, progress=progress)
    beast = replace(BEAST, models=by_instance([view]), healthy=healthy)
    job = LoadJob(LoadPlan(MODEL, "beast", (0,), 0, Fit.NOW, 0, 0), "", 88.0, loading_since=1.0)
    return waiting_note(MODEL, fleet(beast, BENJY), job if loading else None, None, 100.0)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (
            Progress(phase="loading weights", fraction=0.404, remaining_secs=34.2),
            ": loading weights 40 %, about 35 s left",
        ),
        (Progress(phase="compiling", remaining_secs=3), ": compiling, about 3 s left"),
        (Progress(phase="compiling", remaining_secs=3, idle_secs=130.2), ": compiling, nothing done for 130 s"),
        (Progress(phase="compiling"), ": compiling"),
        (Progress(remaining_secs=3), ": about 3 s left"),
        (Progress(), " for 12 s"),
        (None, " for 12 s"),
    ],
)
def test_load_of_ours(progress: Progress | None, expected: str) -> None:
    """The note has the progress that the neuron reports, otherwise how long the load has taken."""
    assert told("loading", progress, loading=True) == WaitNote(text=f"loading org/m on beast{expected}", node="beast")


def test_other_waits() -> None:
    """Another client's load, an engine's recovery, an address lookup, and nothing at all."""
    assert told("loading") == WaitNote(text="loading org/m on beast", node="beast")
    assert told("recovering", Progress(phase="starting")).text == "recovering org/m on beast: starting"
    assert told("loaded").node == "beast"
    for nowhere in (told("unloaded"), told("loading", healthy=False)):
        assert nowhere == WaitNote(text="waiting to load org/m")
    waits = waiting_note(MODEL, fleet(BEAST), None, "a turn", 100.0)
    assert waits == WaitNote(text="waiting to load org/m: a turn")


def failure(node: str, kind: FailureKind, *, fresh: bool = False) -> Failure:
    return Failure(replica=replica(MODEL, node, "http://x", fresh=fresh), reason="", kind=kind)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([failure("a", "refused"), failure("b", "reset")], set()),
        ([failure("a", "refused", fresh=True), failure("b", "reset", fresh=True)], {"a", "b"}),
        ([failure("a", "timeout", fresh=True)], set()),
        ([failure("a", "timeout"), failure("b", "timeout"), failure("a", "timeout")], {"a"}),
        ([failure("a", "status", fresh=True)] * 2, set()),
    ],
)
def test_given_up(failures: list[Failure], expected: set[str]) -> None:
    """A dead engine at an address that was just asked for, and one that was busy twice; never one that answered."""
    assert {key.node for key in given_up(failures)} == expected


def test_untried_first() -> None:
    """Replicas that were not tried come first, those of other nodes before those of a tried one's."""
    keys = [replica_key(MODEL, node) for node in "abcd"]
    left = untried_first(keys, [failure("a", "status"), failure("c", "reset")])
    assert [key.node for key in left] == ["b", "d", "a", "c"]
    keys = [replica_key(MODEL, *place) for place in (("a", "0"), ("a", "1"), ("b", "0"))]
    tried = Failure(replica=replica(MODEL, "a", "http://x", "0"), reason="", kind="refused")
    assert [key.name for key in untried_first(keys, [tried])] == ["b", "a#1", "a"]
    replicas = tuple(replica(MODEL, key.node, "http://x", key.instance) for key in keys)
    assert [each.name for each in untried(replicas, [], replicas[0])] == ["b"]
    assert [each.name for each in untried(replicas[:2], [tried], None)] == ["a#1"]


@pytest.mark.parametrize(
    ("count", "view", "expected"),
    [
        (2, ModelView(id="old", status="loaded"), "old has 2 requests of this cortex to finish"),
        (0, ModelView(id="old", status="loaded"), "old is about to end"),
        (
            0,
            ModelView(
                id="old",
                status="unloaded",
                state="draining",
                progress=Progress(phase="draining", message="1 request to finish"),
            ),
            "old has 1 request to finish",
        ),
        (0, ModelView(id="old", status="unloaded", state="stopping"), "the processes of old are ending"),
    ],
)
def test_a_swap_says_what_it_waits_for(count: int, view: ModelView, expected: str) -> None:
    beast = replace(BEAST, models=by_instance([view]))
    leaving = fleet(beast, BENJY, evicting=(("old", "beast"), ("other", "benjy")))
    assert leaving_text(leaving, beast, lambda key: count) == expected
    assert not leaving_text(fleet(beast), beast, lambda key: count)


def test_a_load_says_which_model_must_be_gone() -> None:
    message = "waiting until old is gone from the same device"
    assert told("loading", Progress(phase="waiting", message=message)).text == f"loading org/m on beast: {message}"
