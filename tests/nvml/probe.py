"""A real process with a `DetectedTopologySource`: reads one command a line and answers each with a line of JSON.

Commands: discover, health, processes, and gap (the longest time in seconds that the event loop stood still during a
`health`, and the time that call took).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

from neuron.gpu.discovery import DetectedTopologySource
from tests.nvml.library import REPOSITORY


class Probe:
    """The test's end of the process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout

    def ask(self, command: str) -> Any:
        print(command, file=self._stdin, flush=True)
        line = self._stdout.readline()
        assert line, f"the probe ended at {command!r}"
        return json.loads(line)


@contextmanager
def probing(environment: Mapping[str, str]) -> Iterator[Probe]:
    """A probe with these environment variables, which must exit with status 0 when its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.nvml.probe"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Probe(process)
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


async def answer(source: DetectedTopologySource, command: str) -> Any:
    if command == "discover":
        topology = await source.discover()
        return {
            **asdict(topology),
            "devices": [device.model_dump(mode="json") for device in topology.devices],
            "links": [link.model_dump(mode="json") for link in topology.links],
        }
    if command == "health":
        return [device.model_dump() for device in (await source.read()).health]
    if command == "processes":
        return await source.process_memory_mb()
    return await _gap(source)


async def _gap(source: DetectedTopologySource) -> dict[str, float]:
    longest, started = 0.0, time.monotonic()
    call = asyncio.create_task(source.read())
    while not call.done():
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - before)
    await call
    return {"longest_secs": longest, "call_secs": time.monotonic() - started}


async def main() -> None:
    source = DetectedTopologySource()
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await answer(source, line.strip())), flush=True)
    await source.close()
    await source.close()  # harmless when repeated


if __name__ == "__main__":
    asyncio.run(main())
