"""Two cortexes that keep the same instances loaded, before two hosts that each of them calls by the other's name: by
itself each would begin on another host."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path

from tests.cortex.cortex_process import ListedNeuron, cortex_process
from tests.e2e.replicas.fleet import Hosts, running_hosts
from tests.neuron.conftest import mark
from tests.neuron.neurons import until

__all__ = ["mark"]

MODEL = "org/small"
MINIMUM = 7
ROUNDS = 4


async def _started(hosts: Hosts) -> int:
    """Engines that both neurons have started."""
    count = 0
    for neuron in hosts.neurons.values():
        text = (await neuron.call("GET", "/metrics")).body
        found = re.findall(r"^neuron_model_load_seconds_count\{.*\} (\d+)", text, re.MULTILINE)
        count += sum(map(int, found))
    return count


async def _loaded(hosts: Hosts) -> int:
    return sum([len(await hosts.loaded(MODEL, name)) for name in hosts.neurons])


async def test_the_minimum_is_kept_once(mark: str, tmp_path: Path) -> None:
    """However often all instances are gone at once, seven are loaded again, not eight or more."""
    model = {"id": MODEL, "harness": "sim", "vram_mb": 20_000, "replicas": {"min": MINIMUM, "max": 16}}
    async with contextlib.AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(running_hosts(tmp_path, [model], names=("a", "b")))
        swapped = [ListedNeuron(name, hosts.neurons[other].base) for name, other in ("ab", "ba")]
        directory = tmp_path / "second"
        directory.mkdir()
        await stack.enter_async_context(cortex_process(directory, swapped, [model]))
        for number in range(1, ROUNDS + 1):
            await until(lambda: _reached(hosts, MINIMUM), 40)
            await asyncio.sleep(1.5)  # a pass of each cortex: none may add to what is there
            assert (await _loaded(hosts), await _started(hosts)) == (MINIMUM, number * MINIMUM)
            await asyncio.gather(*(neuron.unload(MODEL) for neuron in hosts.neurons.values()))


async def _reached(hosts: Hosts, count: int) -> bool:
    return await _loaded(hosts) >= count
