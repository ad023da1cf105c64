"""Commands that follow a cortex: what they say when it sends no more."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cortex.cli.live.followed import FollowedFleet
from cortex.cli.live.screen import screen
from tests.cortex.api.keyed_fleet import key_entry, keyed_fleet
from tests.cortex.conftest import StartCortex
from tests.cortex.cortex_process import TOP, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until


async def test_logs_of_a_key_that_is_revoked(start_cortex: StartCortex, tmp_path: Path) -> None:
    """The command says why it ends, and fails."""
    async with keyed_fleet(start_cortex, tmp_path, key_entry("alice", "operator")) as fleet:
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cortex", "logs", "m", "-f", "--url", fleet.cortex.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=TOP,
            env={**os.environ, "CORTEX_API_KEY": "sk-alice"},
        )
        assert command.stdout is not None
        assert await command.stdout.readline() == b"starting\n"
        await fleet.use_keys(key_entry("bob", "operator"))
        fleet.benjy.more.set()
        output, errors = await command.communicate()
    assert (command.returncode, output) == (1, b"")
    assert b"the API key or session was revoked" in errors


async def test_the_age_of_what_top_shows(tmp_path: Path, benjy: V1Neuron, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that cortex has not said makes it younger."""
    monkeypatch.delenv("CORTEX_API_KEY", raising=False)
    async with cortex_process(tmp_path, [benjy], [{"id": "m"}]) as cortex:
        followed = FollowedFleet(cortex.url)
        await until(lambda: followed.fleet is not None)
        cortex.process.send_signal(signal.SIGKILL)
        await until(lambda: "refused" in (followed.problem or ""))
        heard_at = followed.heard_at
        followed.changed.clear()
        await asyncio.to_thread(followed.changed.wait)  # it has tried again
    assert followed.heard_at == heard_at
    assert followed.fleet is not None
    for problem, age_secs, said in (
        (followed.problem, 7.0, f"{followed.problem}: what you see is 7 s old"),
        (None, 42.0, "cortex does not answer: what you see is 42 s old"),
        (None, 15.5, ""),
    ):
        console = Console(file=io.StringIO(), width=400)
        console.print(screen(followed.fleet, problem=problem, order="name", now=0.0, age_secs=age_secs))
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        assert said in shown if said else "old" not in shown
