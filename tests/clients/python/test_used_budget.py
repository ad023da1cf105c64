"""The libraries of OpenAI and Anthropic, current and old, with a key that has used up its budget: they retry by
default, but do not sleep until there is a new one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.running import TOP, Bench, Outside
from tests.services import running_fleet

MODEL, KEY = "sim/first", "sk-of-this-test"
BUDGET = f"""
[[keys]]
name = "few"
key = "{KEY}"
budget = "200tokens/30d"
"""


@pytest.fixture(scope="module")
def limited_bench(tmp_path_factory: pytest.TempPathFactory, proxy: Outside) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("limited")
    (directory / "keys.toml").write_text(BUDGET, encoding="utf-8")
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 5090"]}}
    cortex = {"keys": {"file": "keys.toml"}, "auth": {"trust_loopback": True}, "state_dir": "cortex-state"}
    model = {"id": MODEL, "harness": "sim", "vram_mb": 4000, "limit": {"context": 4096}}
    with running_fleet(directory, neuron, cortex, {"models": [model]}) as fleet:
        yield Bench(fleet, directory, proxy)


@pytest.mark.parametrize("environment", ["python", "old_python"])
def test_a_used_budget_is_reported_at_once(
    limited_bench: Bench, environment: str, request: pytest.FixtureRequest
) -> None:
    python: Path = request.getfixturevalue(environment)
    command: list[str | Path] = [python, "-m", "tests.clients.scripts.used_budget", limited_bench.url, MODEL]
    output = limited_bench.run(command, KEY=KEY, PYTHONPATH=str(TOP), PYTHONDONTWRITEBYTECODE="1")
    refusals = json.loads(output)
    assert refusals.keys() == {"openai", "anthropic"}
    for refusal in refusals.values():
        wait, _, text = refusal.partition(" ")
        assert int(wait) > 29 * 86400
        assert "429" in text
        assert "does not have enough left of its budget of 200 tokens per 30d" in text
