"""Usage is exact: what many clients use through several workers is in the database as the engine counted it, although a
worker is killed meanwhile.

`USAGE_TEST_REQUESTS=10000 pytest …` runs the full size.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from tests.cortex.accounts.usage.counting import KEYS, LOST_SECS, MODEL, REQUESTS, Clients, CountingEngine, Tokens
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

PRICES = {"input": 1.0, "cached_input": 0.5, "output": 4.0}
PHASES = {"before": REQUESTS * 3 // 10, "kill": REQUESTS * 4 // 10, "after": REQUESTS * 3 // 10}
"""How many requests come before the kill and are recorded, around it, and after it."""


async def kill_a_worker(cortex: CortexProcess, clients: Clients, answered: int) -> float:
    """Once that many requests are answered. When it was."""
    await until(lambda: len(clients.answered) >= answered, secs=60.0)
    children = psutil.Process(cortex.process.pid).children()
    worker = next(child for child in children if "cortex.workers" in child.cmdline())
    killed_at = time.time()
    worker.kill()
    return killed_at


def recorded(database: Path) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(
            "SELECT request_id, key, prompt_tokens, cached_tokens, completion_tokens, cost, status, complete FROM usage"
        ).fetchall()


@pytest.mark.timeout(60 + REQUESTS / 20)
async def test_usage_is_what_the_engine_counted(tmp_path: Path, benjy: V1Neuron) -> None:
    """Requests of a killed worker that were in flight, or had ended less than a second before, have no record; all
    others have one, with the engine's own counts."""
    engine = CountingEngine()
    benjy.engine.answer = engine.answer
    benjy.models = {MODEL: "loaded"}
    database = tmp_path / "state" / "cortex.db"
    (tmp_path / "keys.toml").write_text(tomli_w.dumps({"keys": KEYS}), encoding="utf-8")
    keys, models = {"file": str(tmp_path / "keys.toml")}, [{"id": MODEL, "prices": PRICES}]
    async with cortex_process(tmp_path, [benjy], models, workers=4, state_dir="state", keys=keys) as cortex:
        clients = Clients([cortex.url])
        await clients.ask(PHASES["before"])
        await until(lambda: len(recorded(database)) == PHASES["before"], secs=60.0)
        killing = asyncio.create_task(kill_a_worker(cortex, clients, PHASES["before"] + PHASES["kill"] // 3))
        around_the_kill = await clients.ask(PHASES["kill"])
        killed_at = await killing
        await clients.ask(PHASES["after"])
        cortex.process.send_signal(signal.SIGTERM)
        assert await cortex.ended(secs=30.0) == 0
    assert not clients.refused
    rows = recorded(database)
    found = {row[0]: Tokens(*row[2:5]) for row in rows if row[7]}
    assert len({row[0] for row in rows}) == len(rows)
    assert found == {number: engine.served[number] for number in found}
    missing = engine.served.keys() - found.keys()
    assert clients.lost | missing <= around_the_kill
    for number in missing - clients.lost:
        assert killed_at - LOST_SECS <= clients.answered[number] <= killed_at + LOST_SECS
    print(f"{len(clients.lost)} requests were lost with the worker, {len(missing)} have no record")
    for number, key, prompt, cached, completion, cost, status, complete in rows:
        assert key == f"key{int(number.removeprefix('request-')) % 20}"
        if complete:
            assert status == 200
            assert cost == pytest.approx(((prompt - cached) * 1.0 + cached * 0.5 + completion * 4.0) / 1e6)
