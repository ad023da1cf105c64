"""`replicas` on hosts with eight simulated H100, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import tomli_w

from tests.e2e.replicas.fleet import Hosts, running_hosts
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, until

__all__ = ["mark"]

SMALL, BIG = "org/small", "org/big"


def small(minimum: int, maximum: int | None = None, **fields: Any) -> dict[str, Any]:
    replicas = {"min": minimum, "max": maximum or max(1, minimum)}
    return {"id": SMALL, "harness": "sim", "vram_mb": 20_000, "replicas": replicas, **fields}


def big(**fields: Any) -> dict[str, Any]:
    return {"id": BIG, "harness": "sim", "vram_mb": 140_000, "min_devices": 2, **fields}


def devices(engines: list[dict[str, Any]]) -> list[int]:
    return sorted(index for engine in engines for index in engine["devices"])


async def test_eight_instances_on_eight_devices(mark: str, tmp_path: Path) -> None:
    """Traffic spreads evenly over them. Of a killed one, that one comes back, and the others stay."""
    async with running_hosts(tmp_path, [small(8)]) as hosts:
        engines = await hosts.until_loaded(SMALL, 8)
        assert devices(engines) == list(range(8))
        assert [engine["instance"] for engine in engines] == [str(number) for number in range(8)]
        for _ in range(20):
            asked = [hosts.ask(SMALL, f"{os.urandom(8).hex()} {number}") for number in range(16)]
            assert await asyncio.gather(*asked) == [200] * 16
        counts = await until(lambda: _all_reported(hosts, 320))
        assert min(counts.values()) >= 20, counts
        assert max(counts.values()) <= 80, counts
        await _comes_back(hosts, engines)


async def _all_reported(hosts: Hosts, total: int) -> Any:
    counts = await hosts.answered(SMALL)
    return counts if counts.total() >= total else None


async def _comes_back(hosts: Hosts, engines: list[dict[str, Any]]) -> None:
    victim = engines[3]
    os.kill(victim["pid"], signal.SIGKILL)
    await until(lambda: _is_gone(hosts, victim))
    after = await hosts.until_loaded(SMALL, 8)
    assert devices(after) == list(range(8))
    changed = [
        (old["instance"], old["devices"] == new["devices"])
        for old, new in zip(engines, after, strict=True)
        if old["pid"] != new["pid"]
    ]
    assert changed == [(victim["instance"], True)]


async def _is_gone(hosts: Hosts, engine: dict[str, Any]) -> bool:
    return all(each.get("pid") != engine["pid"] for each in await hosts.loaded(SMALL))


async def test_six_instances_beside_a_larger_model(mark: str, tmp_path: Path) -> None:
    """Nothing of equal priority is evicted for the two that have no room. They come when the large model goes."""
    async with running_hosts(tmp_path, [big(), small(0)]) as hosts:
        assert await hosts.ask(BIG) == 200
        await _reload(hosts, [big(), small(8)])
        engines = await hosts.until_loaded(SMALL, 6)
        [large] = await hosts.loaded(BIG)
        assert sorted([*devices(engines), *large["devices"]]) == list(range(8))
        await hosts.stays_loaded(SMALL, 6, secs=1.5)
        assert (await hosts.operate("unload", model=BIG))["status"] == "unloaded"
        assert devices(await hosts.until_loaded(SMALL, 8)) == list(range(8))


async def test_the_larger_model_takes_instances_above_the_minimum(mark: str, tmp_path: Path) -> None:
    """Only as many as it needs, and none that `replicas.min` keeps."""
    async with running_hosts(tmp_path, [big(), small(8)], placement={"min_residency_secs": 0}) as hosts:
        await hosts.until_loaded(SMALL, 8)
        assert await hosts.ask(BIG) == 503  # all eight are kept
        await _reload(hosts, [big(), small(6, 8)])
        assert await hosts.ask(BIG) == 200
        engines = await hosts.until_loaded(SMALL, 6)
        [large] = await hosts.loaded(BIG)
        assert sorted([*devices(engines), *large["devices"]]) == list(range(8))


async def _reload(hosts: Hosts, models: list[dict[str, Any]]) -> None:
    """Until cortex has read the new catalogue."""
    before = hosts.cortex.log().count("configuration reloaded")
    path = hosts.directory / "models.toml"
    path.with_suffix(".new").write_text(tomli_w.dumps({"models": models}), encoding="utf-8")
    path.with_suffix(".new").replace(path)
    await until(lambda: hosts.cortex.log().count("configuration reloaded") > before)


async def test_two_hosts_share_the_instances(mark: str, tmp_path: Path) -> None:
    """Hosts come before devices. What a host lacks after its end is loaded on the other, all at once."""
    async with running_hosts(tmp_path, [small(6)], names=("a", "b")) as hosts:
        for name in "ab":
            assert devices(await hosts.until_loaded(SMALL, 3, name)) == [0, 1, 2]
        await hosts.neurons["b"].stop(signal.SIGTERM)
        assert devices(await hosts.until_loaded(SMALL, 6, "a")) == list(range(6))


async def test_per_node_limits_a_host(mark: str, tmp_path: Path) -> None:
    model = {**small(6), "replicas": {"min": 6, "per_node": 2}}
    async with running_hosts(tmp_path, [model], names=("a", "b")) as hosts:
        for name in "ab":
            await hosts.until_loaded(SMALL, 2, name)
        await hosts.stays_loaded(SMALL, 2, secs=1.5)


async def test_pressure_adds_an_instance_on_the_same_host(mark: str, tmp_path: Path) -> None:
    """And it goes when the pressure is over."""
    rules = {"replica_target": 2, "scale_up_secs": 0.5, "scale_down_secs": 2, "min_residency_secs": 0}
    model = small(1, 3, args=["--tokens-per-sec", "20"])
    async with running_hosts(tmp_path, [model], placement=rules) as hosts:
        await hosts.until_loaded(SMALL, 1)
        load = asyncio.create_task(_pressure(hosts))
        try:
            await until(lambda: _has(hosts, 2), 30)
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        assert len({index for each in await hosts.loaded(SMALL) for index in each["devices"]}) >= 2
        await hosts.until_loaded(SMALL, 1)


async def _has(hosts: Hosts, count: int) -> bool:
    return len(await hosts.loaded(SMALL)) >= count


async def _pressure(hosts: Hosts) -> None:
    async def client(number: int) -> None:
        while True:
            await hosts.ask(SMALL, f"{number}", tokens=40)

    await asyncio.gather(*map(client, range(8)))


async def test_a_restart_of_the_neuron_keeps_the_instances(mark: str, tmp_path: Path) -> None:
    """The next neuron adopts them, and cortex loads none a second time."""
    async with running_hosts(tmp_path, [small(4)]) as hosts:
        before = await hosts.until_loaded(SMALL, 4)
        await hosts.neurons["a"].stop(signal.SIGKILL)
        async with neuron_process(tmp_path / "a" / "neuron.toml") as second:
            hosts.neurons["a"] = second
            after = await hosts.until_loaded(SMALL, 4)
            assert [each["pid"] for each in before] == [each["pid"] for each in after]
            await hosts.stays_loaded(SMALL, 4, secs=2)
            await hosts.operate("unload", model=SMALL)
