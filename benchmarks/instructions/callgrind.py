"""cortex under valgrind: how many instructions it executes between two moments."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.instructions.peers import API_KEY, HOST, MODEL, Peers
from benchmarks.scale.http1 import Connection, until_answers
from benchmarks.scale.services import Child, cpu_secs, free_ports

PLAIN, SHORT_STREAMS, STREAMS, CHUNKS = 1500, 300, 8, 1000
"""Of the smaller measurement of each pair; the larger has twice as many requests, or chunks in a stream. With five
times fewer, what cortex does now and then (the database of keys, every second) moved a figure by 5 to 40 %."""
LIMITED_KEY = f'[[keys]]\nname = "limited"\nkey = "{API_KEY}"\nrpm = 100000000\ntpm = 100000000000\nparallel = 1000\n'
START_SECS = 300.0
QUIET_SECS = 0.3
"""Without CPU use for this long, cortex has finished a request's trailing work (log line, counters)."""
IDLE_SECS = 15.0
"""How long an idle cortex is counted: its timers execute a million instructions a second, most of them to see whether a
key has been revoked, and on a busy machine a measurement takes seconds longer."""


class NotAvailable(Exception):
    """Instructions cannot be counted here; the message says why."""


class CountedCortex:
    """A cortex whose instructions are counted."""

    def __init__(self, child: Child, directory: Path, port: int) -> None:
        self._child = child
        self._directory = directory
        self._dumps = 0
        self._idle_rate = 0.0  # instructions per second
        self._counted_at = 0.0
        self.port = port

    async def count_idle(self) -> None:
        """Counts what it executes without requests. Later counts leave that out."""
        await self.instructions()
        began = self._counted_at
        await asyncio.sleep(IDLE_SECS)
        idle = await self.instructions()
        self._idle_rate = idle / (self._counted_at - began)

    async def instructions(self) -> float:
        """Executed since the last call, for requests."""
        await self._until_quiet()
        control = ["callgrind_control", "--dump", str(self._child.pid)]
        done = await asyncio.to_thread(subprocess.run, control, capture_output=True, text=True, timeout=60, check=False)
        self._dumps += 1
        dump = self._directory / f"counts.{self._dumps}"
        if done.returncode != 0 or not dump.exists():
            raise NotAvailable(f"callgrind_control: {done.stdout}{done.stderr}")
        found = re.findall(r"^totals: (\d+)", dump.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        before, self._counted_at = self._counted_at, time.monotonic()
        return sum(map(int, found)) - self._idle_rate * (self._counted_at - before)

    async def _until_quiet(self) -> None:
        last = -1.0
        while (now := cpu_secs(self._child.pid)) != last:
            self._child.check()
            last = now
            await asyncio.sleep(QUIET_SECS)


@asynccontextmanager
async def counted_cortex(
    directory: Path, neuron_port: int, packages: Path, *, keys: str = ""
) -> AsyncIterator[CountedCortex]:
    """The `cortex serve` of `packages` under callgrind, in sight of its neuron. It polls once and never again. `keys`:
    its API keys, in TOML.

    Raises:
        NotAvailable: valgrind is not installed.
    """
    if shutil.which("valgrind") is None or shutil.which("callgrind_control") is None:
        raise NotAvailable("valgrind is not installed")
    port, metrics_port = free_ports(2)
    (directory / "models.toml").write_text(f"[[models]]\nid = {json.dumps(MODEL)}\n", encoding="utf-8")
    config = directory / "cortex.toml"
    config.write_text(
        f'[gateway]\nlisten = "{HOST}:{port}"\nmetrics_listen = "{HOST}:{metrics_port}"\n'
        "[poll]\ninterval_secs = 86400\ntimeout_secs = 120\n"
        f'[[neurons]]\nname = "host"\nendpoint = "http://{HOST}:{neuron_port}"\n',
        encoding="utf-8",
    )
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={directory / 'counts'}", "--dump-instr=no"]
    command = [*valgrind, sys.executable, "-m", "cortex", "serve", "--config", str(config)]
    environ = {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(packages),
        "XDG_STATE_HOME": str(directory),  # leaves nothing in the home directory
        "CORTEX_KEYS": keys,
    }
    with Child(command, directory / "cortex.log", environ=environ, directory=str(packages)) as child:
        await until_answers(HOST, port, "/health", within_secs=START_SECS, pause_secs=0.5)
        yield CountedCortex(child, directory, port)


async def count(directory: Path, packages: Path) -> dict[str, float]:
    """Instructions of the cortex in `packages` for a plain request, for a streamed chunk, and for a stream of one token
    on a connection of its own.

    Each is the difference of a measurement and one of twice the size, so that what both have in common cancels out.

    Raises:
        NotAvailable: valgrind is not installed, or may not control a process here.
    """
    limited = directory / "limited"
    limited.mkdir()
    peers = Peers()
    (neuron_port,) = free_ports(1)
    server = await peers.listen(neuron_port)
    async with counted_cortex(directory, neuron_port, packages) as cortex:
        client = await Connection(HOST, cortex.port).open()

        async def plain(requests: int) -> float:
            await peers.plain(client, requests)
            return await cortex.instructions()

        async def streams(number: int, chunks: int, *, asks: bool = True) -> float:
            for _ in range(number):
                await peers.stream(cortex.port, chunks, asks=asks)
            return await cortex.instructions()

        async def unasked(number: int, chunks: int) -> float:
            return await streams(number, chunks, asks=False)

        await plain(PLAIN)
        await streams(SHORT_STREAMS, 1)
        await unasked(SHORT_STREAMS, 1)
        await cortex.count_idle()
        request = (await plain(2 * PLAIN) - await plain(PLAIN)) / PLAIN
        stream = (await streams(2 * SHORT_STREAMS, 1) - await streams(SHORT_STREAMS, 1)) / SHORT_STREAMS
        chunk = (await streams(STREAMS, 2 * CHUNKS) - await streams(STREAMS, CHUNKS)) / (STREAMS * CHUNKS)
        unasked_stream = (await unasked(2 * SHORT_STREAMS, 1) - await unasked(SHORT_STREAMS, 1)) / SHORT_STREAMS
        unasked_chunk = (await unasked(STREAMS, 2 * CHUNKS) - await unasked(STREAMS, CHUNKS)) / (STREAMS * CHUNKS)
        client.close()
    async with counted_cortex(limited, neuron_port, packages, keys=LIMITED_KEY) as cortex:
        client = await Connection(HOST, cortex.port).open()
        await plain(PLAIN)
        await cortex.count_idle()
        limited_request = (await plain(2 * PLAIN) - await plain(PLAIN)) / PLAIN
        client.close()
    server.close()
    return {
        "plain request": request,
        "plain request, limited key": limited_request,
        "streamed chunk": chunk,
        "one-token stream": stream,
        "streamed chunk, usage unasked": unasked_chunk,
        "one-token stream, usage unasked": unasked_stream,
    }
