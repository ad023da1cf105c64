"""Generated requests: rates by the hour, sessions in parallel, batches at fixed hours, and the example workloads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cortex.config.catalogue import Catalogue
from cortex.simulator.fleet_file import load_fleet
from cortex.simulator.trace import Ask
from cortex.simulator.workload import load_workload, make_trace
from shared.settings import SettingsError

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "simulate"
CATALOGUE = Catalogue.model_validate({"models": [{"id": "a"}, {"id": "b"}]})
WORKLOADS = {
    "workload.toml": "fleet.toml",
    "office-hours.toml": "fleet.toml",
    "agents.toml": "fleet.toml",
    "noisy-user.toml": "fleet.toml",
    "nightly-batch.toml": "fleet.toml",
    "big-models.toml": "many-cards.toml",
}


def made(tmp_path: Path, text: str, *, load: float = 1.0, seed: int = 1) -> list[Ask]:
    path = tmp_path / "workload.toml"
    path.write_text(text, encoding="utf-8")
    return make_trace(load_workload(path, CATALOGUE), CATALOGUE, seed=seed, load=load)


@pytest.mark.parametrize(("workload", "fleet"), WORKLOADS.items())
def test_an_example_workload_asks_for_all_its_models(workload: str, fleet: str) -> None:
    """Ten hours of it fit its fleet's catalogue, and the same seed gives the same requests."""
    catalogue = load_fleet(EXAMPLE / fleet).catalogue
    described = load_workload(EXAMPLE / workload, catalogue)
    asks = make_trace(described, catalogue, seed=2)
    assert asks == make_trace(described, catalogue, seed=2)
    assert {ask.model for ask in asks} == {catalogue.resolve(users.model) for users in described.users}


def test_sessions_follow_the_rates_of_the_hours(tmp_path: Path) -> None:
    """No session in an hour of rate 0, three times as many in the third hour as in the second, the mean as said; the
    list repeats."""
    text = (
        "hours = 6\nsessions_per_hour = 300\nwave_factor = 1\nhourly = [0, 1, 3]\n[[users]]\nmodel = 'a'\nrequests = 1"
    )
    by_hour = Counter(int(ask.at // 3600) for ask in made(tmp_path, text))
    assert by_hour[0] == by_hour[3] == 0
    assert sum(by_hour.values()) == pytest.approx(1800, rel=0.1)
    assert by_hour[2] + by_hour[5] == pytest.approx(3 * (by_hour[1] + by_hour[4]), rel=0.2)


def test_parallel_sessions_start_together(tmp_path: Path) -> None:
    text = "sessions_per_hour = 1\n[[users]]\nmodel = 'a'\nrequests = 1\nparallel = 8"
    asks = made(tmp_path, text)
    assert asks
    assert len(asks) % 8 == 0
    assert asks[7].at - asks[0].at < 60


@pytest.mark.parametrize(("load", "sessions"), [(1, 4), (2, 8), (0.1, 1)])
def test_a_batch_starts_at_its_hours_only(tmp_path: Path, load: float, sessions: int) -> None:
    """The load multiplies its sessions, but one remains."""
    text = "[[users]]\nmodel = 'a'\nrequests = 1\nparallel = 4\nat_hours = [0.5, 1.5]"
    asks = made(tmp_path, text, load=load)
    assert len(asks) == 2 * sessions
    assert all(0 <= ask.at - hour < 120 for ask, hour in zip(asks, sorted([1800, 5400] * sessions), strict=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hourly = [0, 0]\n[[users]]\nmodel = 'a'", "at least one hour must be above 0"),
        ("hourly = [1, -1]\n[[users]]\nmodel = 'a'", "hourly"),
        ("[[users]]\nmodel = 'a'\nweight = 2\nat_hours = [1]", "weight and at_hours exclude each other"),
        ("[[users]]\nmodel = 'a'\nparallel = 0", "users[0].parallel"),
    ],
)
def test_a_mistake_in_the_workload_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        made(tmp_path, text)
    assert said in str(caught.value)
