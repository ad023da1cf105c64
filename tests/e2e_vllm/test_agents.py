"""vLLM accepts what coding agents send: dozens of tools, long instructions, fields that no other client uses."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.agents.commands import claude, codex, opencode
from tests.clients.conftest import node
from tests.clients.running import Bench, outside
from tests.e2e_vllm.fleet import ROOMY
from tests.environment.clients import NodeEnvironment
from tests.processes import eventually
from tests.services import Fleet

__all__ = ["node"]

pytestmark = [pytest.mark.vllm, pytest.mark.clients, pytest.mark.timeout(300)]
FEW = 32  # the model has random weights: it never stops


@pytest.fixture(scope="module", autouse=True)
def _loaded(fleet: Fleet) -> Iterator[None]:
    """The model is loaded for these tests, and for no others."""
    assert fleet.cortex.request("/v1/completions", {"model": ROOMY, "prompt": "a", "max_tokens": 1}).status == 200
    yield
    fleet.unload(ROOMY)


def run_claude(bench: Bench, node: NodeEnvironment) -> subprocess.CompletedProcess[str]:
    return claude(bench, node, "Say hello", model=ROOMY, output_tokens=FEW)


def run_codex(bench: Bench, node: NodeEnvironment) -> subprocess.CompletedProcess[str]:
    return codex(bench, node, "Say hello", model=ROOMY)


def run_opencode(bench: Bench, node: NodeEnvironment) -> subprocess.CompletedProcess[str]:
    return opencode(bench, node, "Say hello", model=ROOMY, small=ROOMY, output_tokens=FEW)


@pytest.mark.parametrize(
    ("run", "path"),
    [
        (run_claude, "/v1/messages"),
        (run_codex, "/v1/responses"),
        (run_opencode, "/v1/chat/completions"),
    ],
)
def test_every_request_is_accepted(
    fleet: Fleet,
    node: NodeEnvironment,
    tmp_path: Path,
    run: Callable[[Bench, NodeEnvironment], subprocess.CompletedProcess[str]],
    path: str,
) -> None:
    """200 for each; without the tool parser in the catalogue's arguments it would be 400."""
    before = len(fleet.cortex.log())
    with outside() as proxy:
        done = run(Bench(fleet, tmp_path, proxy), node)

    def requests() -> list[str]:
        """The log's lines; they come up to 0.1 s late."""
        return [line for line in fleet.cortex.log()[before:].splitlines() if f" cortex.access: POST {path} " in line]

    lines = eventually(requests, f"a request to {path}\n{done.stdout}\n{done.stderr}", within_secs=5)
    assert [line for line in lines if f"POST {path} 200 " not in line] == [], f"{done.stdout}\n{done.stderr}"
