"""Keys in the simulator: one that forces swaps makes the others wait little."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cortex.simulator.outcome import Outcome, WaitFigures
from cortex.simulator.simulation import simulate
from cortex.simulator.trace import Ask, read_trace, write_trace
from cortex.simulator.workload import load_workload, make_trace
from tests.cortex.simulator.test_simulator import EXAMPLE, ONE_CARD, UNLOAD_SECS, fleet_of

LOAD_SECS = 5.0
SWAP_SECS = LOAD_SECS + UNLOAD_SECS
FLEET = (
    ONE_CARD.replace("base = 10", f"base = {LOAD_SECS}").replace(
        "[aliases]", "[[models]]\nid = 'c'\nvram_mb = 20000\n[aliases]"
    )
    + "[serving]\nmodels = { b = 4, c = 4 }\n"
)
QUIET_KEYS = [f"quiet{number}" for number in range(9)]
SECS = 900.0


def _quiet() -> list[Ask]:
    """Nine keys that ask for `a` every few seconds."""
    chance = random.Random(5)
    asks: list[Ask] = []
    for key in QUIET_KEYS:
        at = chance.uniform(0, 4)
        while at < SECS:
            asks.append(Ask(at, "a", 0.2, key))
            at += chance.uniform(2, 6)
    return asks


def _noisy(count: int = 500) -> list[Ask]:
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
    path.write_text('[[users]]\nmodel = "a"\nkey = "k"\n[[users]]\nmodel = "b"\n', encoding="utf-8")
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
