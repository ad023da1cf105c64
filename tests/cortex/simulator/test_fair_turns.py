"""Keys in the simulator: one that forces swaps makes the others wait little."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cortex.simulator.outcome import Outcome, WaitFigures
from cortex.simulator.simulation import simulate
from cortex.simulator.trace import Ask, read_trace, write_trace
from cortex.simulator.workload import load_workload, make_trace
from tests.cortex.simulator.test_simulator import EXAMPLE, ONE_CARD, UNLOAD_SECS, fleet_of, run

LOAD_SECS = 5.0
SWAP_SECS = LOAD_SECS + UNLOAD_SECS
FLEET = (
    ONE_CARD.replace("base = 10", f"base = {LOAD_SECS}").replace(
        "[aliases]", "[[models]]\nid = 'c'\nvram_mb = 20000\n[aliases]"
    )
    + "[serving]\nmodels = { b = 4, c = 4 }\n"
)
QUIET_KEYS = [f"quiet{number}" for number in range(9)]
SECS = 600.0


def _quiet(models: str = "a") -> list[Ask]:
    """Nine keys that ask every few seconds, each for one of these models."""
    chance = random.Random(5)
    asks: list[Ask] = []
    for number, key in enumerate(QUIET_KEYS):
        at = chance.uniform(0, 4)
        while at < SECS:
            asks.append(Ask(at, models[number % len(models)], 0.2, key))
            at += chance.uniform(2, 6)
    return asks


def _noisy(count: int = 300) -> list[Ask]:
    """One key that asks for two other models, which do not fit beside."""
    return [Ask(60 + number, "bc"[number % 2], 1.0, "noisy") for number in range(count)]


def _of_quiet(outcome: Outcome) -> list[WaitFigures]:
    return [outcome.waiting_by_key[key] for key in QUIET_KEYS]


def test_a_key_that_forces_swaps_delays_the_others_by_at_most_one_swap(tmp_path: Path) -> None:
    """95 % of their requests wait at most a swap longer than without it. All of its own are served."""
    fleet = fleet_of(tmp_path, FLEET)
    alone = simulate(fleet, sorted(_quiet()), "planner")
    together = simulate(fleet, sorted([*_quiet(), *_noisy()]), "planner")
    before, after = (outcome.by_model["a"].waiting for outcome in (alone, together))
    assert after.p95 <= 1.5 * before.p95 + SWAP_SECS
    assert together.total.unserved == 0


def _several(noisy_mb: int) -> str:
    """A card for the three models of the quiet keys, or for fewer and one of the noisy key."""
    sizes = {**dict.fromkeys("ade", 7000), **dict.fromkeys("bc", noisy_mb)}
    models = ", ".join(f"{{ id = '{name}', vram_mb = {mb} }}" for name, mb in sizes.items())
    head, tail = FLEET.split("[[models]]", 1)[0], "[serving]\nmodels = { b = 4, c = 4 }\n"
    return f"models = [{models}]\n{head}{tail}"


@pytest.mark.parametrize(("noisy_mb", "displaced"), [(7000, 1), (14000, 2), (20000, 3)])
def test_quiet_keys_with_several_models_wait_no_longer(tmp_path: Path, noisy_mb: int, displaced: int) -> None:
    """One, two or all of the three models have to go for a turn of the noisy key. 95 % of the requests of each quiet
    key wait at most a swap longer than without it, no quiet model is evicted for another, and the noisy key gets its
    turns meanwhile."""
    fleet = fleet_of(tmp_path, _several(noisy_mb))
    asks = sorted([*_quiet("ade"), *_noisy(200)])
    simulation, outcome = run(fleet, asks, "planner")
    assert max(waits.p95 for waits in _of_quiet(outcome)) <= SWAP_SECS
    served = [
        request for request in simulation.requests if request.key == "noisy" and request.at + request.waited < SECS
    ]
    turns = sum(outcome.by_model[name].loads for name in "bc")
    assert served
    assert sum(outcome.by_model[name].loads for name in "ade") <= 3 + displaced * turns


def test_without_keys_the_same_requests_make_them_wait_longer(tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    fleet, asks = fleet_of(tmp_path, FLEET), sorted([*_quiet(), *_noisy()])
    fair, unfair = (simulate(fleet, asks, "planner", fair=fair) for fair in (True, False))
    for with_turns, without in zip(_of_quiet(fair), _of_quiet(unfair), strict=True):
        assert with_turns.mean < without.mean / 4


@pytest.mark.parametrize("key", ["", "only"])
def test_one_key_or_none_changes_nothing(tmp_path: Path, key: str) -> None:
    """The whole outcome is the same, to the last request."""
    fleet = fleet_of(tmp_path, FLEET)
    asks = sorted(ask._replace(key=key) for ask in [*_quiet(), *_noisy(200)])
    fair, plain = (simulate(fleet, asks, "planner", fair=fair) for fair in (True, False))
    assert fair == plain


def test_a_workload_and_its_trace_name_the_keys(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, ONE_CARD)
    path = tmp_path / "workload.toml"
    path.write_text('hours = 0.1\n[[users]]\nmodel = "a"\nkey = "k"\n[[users]]\nmodel = "b"\n', encoding="utf-8")
    asks = make_trace(load_workload(path, fleet.catalogue), fleet.catalogue, seed=1)
    assert {(ask.model, ask.key) for ask in asks} == {("a", "k"), ("b", "")}
    for name in ("trace.csv", "trace.jsonl"):
        write_trace(tmp_path / name, asks)
        assert read_trace(tmp_path / name, fleet.catalogue) == asks
    outcome = simulate(fleet, asks, "planner")
    assert list(outcome.waiting_by_key) == ["k"]
    assert outcome.waiting_by_key["k"] == outcome.by_model["a"].waiting


def test_the_example_has_a_noisy_key() -> None:
    text = (EXAMPLE / "noisy-user.toml").read_text(encoding="utf-8")
    assert 'key = "noisy"' in text
