"""Energy: what the meter counts is what the GPUs have used, and all of it belongs to an instance or to no one."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from neuron.gpu.energy.meter import EnergyMeter
from neuron.gpu.energy.sharing import LONGEST_GAP_SECS, Resident
from neuron.gpu.topology import DeviceReading, Topology
from neuron.spec import InstanceKey
from shared.protocol import Device, DeviceHealth
from shared.protocol.topology import MIG_KIND

A, B = InstanceKey("a"), InstanceKey("b")
PAIR = (Device(index=0, uuid="GPU-0"), Device(index=1, uuid="GPU-1"))
SLICED = (
    Device(index=0, uuid="GPU-0", mig_mode=True),
    Device(index=101, kind=MIG_KIND, parent=0, vram_total_mb=30000),
    Device(index=102, kind=MIG_KIND, parent=0, vram_total_mb=10000),
)


class Host:
    """A host whose GPUs, instances and clock the test controls."""

    def __init__(self, path: Path | None = None, *, devices: Sequence[Device] = PAIR, boot: str = "boot") -> None:
        self.now = 1000.0
        self.residents: list[Resident] = []
        self.meter = EnergyMeter(path, boot, clock=lambda: self.now)
        self.meter.residents = lambda: self.residents
        self._devices = tuple(devices)

    async def read(self, *powers: float | None, after: float = 0.0, counters: Sequence[float | None] = ()) -> None:
        """A reading of the GPUs, so many seconds after the last one."""
        self.now += after
        gpus = [each for each in self._devices if each.parent is None]
        told = [*counters, *[None] * (len(gpus) - len(counters))]
        health = [
            DeviceHealth(index=gpu.index, power_w=power, energy_wh=counter)
            for gpu, power, counter in zip(gpus, powers, told, strict=True)
        ]
        slices = [DeviceHealth(index=each.index) for each in self._devices if each.parent is not None]
        await self.meter.observe(DeviceReading(Topology(devices=self._devices), [*health, *slices]))

    def device_wh(self, index: int) -> float:
        (live,) = self.meter.added_to([DeviceHealth(index=index)])
        assert live.energy_wh is not None
        return live.energy_wh

    def wh(self, key: InstanceKey, device: int = 0) -> tuple[float, float]:
        """What the instance used for requests, and of the idle draw."""
        for each in self.meter.instances:
            if (each.id, each.instance, each.device) == (*key, device):
                return each.active_wh, each.resident_wh
        return 0.0, 0.0


def resident(key: InstanceKey, *devices: int, requests: int | None = 0, ended: float = 0) -> Resident:
    return Resident(key, devices or (0,), requests, (ended,))


async def test_power_is_integrated() -> None:
    """The area below the line between two samples, for each GPU; a longer gap is not guessed."""
    host = Host()
    await host.read(100, 0)
    await host.read(300, 0, after=18)
    assert host.device_wh(0) == pytest.approx(1.0)
    assert host.device_wh(1) == 0
    await host.read(300, 0, after=LONGEST_GAP_SECS + 1)
    assert host.device_wh(0) == pytest.approx(1.0)


async def test_the_drivers_counter_is_exact() -> None:
    """It counts whatever happened between two readings, and a driver that starts again does not count backwards."""
    host = Host()
    await host.read(100, None, counters=[5.0, 7.0])
    await host.read(100, None, after=3600, counters=[6.5, 7.25])
    assert (host.device_wh(0), host.device_wh(1)) == (1.5, 0.25)
    await host.read(100, None, after=18, counters=[0.1, 0.1])
    assert (host.device_wh(0), host.device_wh(1)) == (2.0, 0.25)


async def test_an_empty_gpu_has_no_shares() -> None:
    """The idle draw of an empty GPU belongs to no instance."""
    host = Host()
    await host.read(100, 100)
    await host.read(100, 100, after=18)
    assert host.device_wh(0) == pytest.approx(0.5)
    assert host.meter.instances == ()


async def test_idle_draw_is_the_residents_and_the_rest_the_active_ones() -> None:
    """Two instances share what the GPU draws without requests; what it draws above is for those with requests."""
    host = Host()
    host.residents = [resident(A), resident(B)]
    await host.read(60, 0)
    await host.read(60, 0, after=18)
    assert host.wh(A) == host.wh(B) == pytest.approx((0, 0.15))
    host.residents = [resident(A, requests=3), resident(B, requests=1)]
    await host.read(60, 0, after=1, counters=[10.0])
    before = host.wh(A), host.wh(B)
    await host.read(60, 0, after=18, counters=[11.3])  # 1 Wh above the 60 W
    assert host.wh(A)[0] - before[0][0] == pytest.approx(0.75)
    assert host.wh(B)[0] - before[1][0] == pytest.approx(0.25)
    assert host.wh(A)[1] - before[0][1] == pytest.approx(0.15)


async def test_a_request_between_two_samples_counts() -> None:
    """Short requests are never seen running, but the engine's count of them grows."""
    host = Host()
    host.residents = [resident(A, ended=4), resident(B)]
    await host.read(60, 0)
    host.residents = [resident(A, ended=5), resident(B)]
    await host.read(60, 0, after=2, counters=[1.0])
    await host.read(300, 0, after=2)
    host.residents = [resident(A, ended=6), resident(B)]
    await host.read(300, 0, after=2)
    assert host.wh(A)[0] > 0
    assert host.wh(B)[0] == 0


async def test_an_instance_on_two_gpus_has_a_count_on_each() -> None:
    """Its energy is the sum."""
    host = Host()
    host.residents = [resident(A, 0, 1)]
    await host.read(100, 200)
    await host.read(100, 200, after=18)
    assert (sum(host.wh(A, 0)), sum(host.wh(A, 1))) == pytest.approx((0.5, 1.0))


async def test_mig_instances_share_the_meter_of_their_gpu() -> None:
    """By their sizes; they have no count of their own."""
    host = Host(devices=SLICED)
    host.residents = [resident(A, 101), resident(B, 102)]
    await host.read(100)
    await host.read(100, after=18)
    await host.read(100, after=18)
    assert (sum(host.wh(A)), sum(host.wh(B))) == pytest.approx((0.75, 0.25))
    host.residents = [resident(A, 101, requests=1), resident(B, 102, requests=50)]
    await host.read(100, after=1, counters=[5.0])
    await host.read(100, after=0.5, counters=[9.0])
    assert host.wh(A)[0] == pytest.approx(3 * host.wh(B)[0])
    assert [live.energy_wh for live in host.meter.added_to([DeviceHealth(index=101)])] == [None]


async def test_counts_survive_a_kill(tmp_path: Path) -> None:
    """What a caller saw is in the file, and the next neuron adds what the driver counted meanwhile to the engines that
    lived on."""
    path = tmp_path / "energy.json"
    first = Host(path)
    first.residents = [resident(A)]
    await first.read(100, 0, counters=[5.0])
    await first.read(100, 0, after=1, counters=[6.0])
    second = Host(path)
    await second.meter.read()
    second.residents = [resident(A)]
    assert second.meter.epoch == first.meter.epoch
    await second.read(100, 0, counters=[8.0])
    assert second.device_wh(0) == 3
    assert sum(second.wh(A)) == 3
    rebooted = Host(path, boot="another")
    await rebooted.meter.read()
    await rebooted.read(100, 0, counters=[2.0])
    assert rebooted.meter.epoch != first.meter.epoch
    assert rebooted.device_wh(0) == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"boot_id": "boot"}', '{"boot_id": "boot", "devices": 3}'])
async def test_a_damaged_file_begins_an_epoch(tmp_path: Path, content: str) -> None:
    """It never prevents a start."""
    path = tmp_path / "energy.json"
    path.write_text(content)
    host = Host(path)
    await host.meter.read()
    await host.read(100, 0)
    assert host.device_wh(0) == 0
    assert json.loads(path.read_text())["epoch"] == host.meter.epoch


@pytest.mark.parametrize("seed", range(20))
async def test_nothing_is_lost_or_counted_twice(tmp_path: Path, seed: int) -> None:
    """Whatever runs where, and however often neuron restarts: the counts of the instances never exceed those of the
    device, do not fall, and account for all of it while there was an instance."""
    dice = random.Random(seed)
    path = tmp_path / "energy.json"
    host, counter, expected, occupied = Host(path), 100.0, 0.0, 0.0
    await host.read(50, 0, counters=[counter])
    seen = 0.0
    for _ in range(60):
        if dice.random() < 0.1:
            now, host = host.now, Host(path)
            host.now = now
            await host.meter.read()
        keys = [key for key in (A, B, InstanceKey("c", "2")) if dice.random() < 0.5]
        host.residents = [
            resident(key, *dice.choice([(0,), (0, 1)]), requests=dice.choice([None, 0, 1, 7]), ended=dice.randrange(3))
            for key in keys
        ]
        used = dice.random()
        counter, expected = counter + used, expected + used
        occupied += used if keys else 0
        await host.read(dice.uniform(10, 400), 0, after=dice.uniform(0.3, 100), counters=[counter])
        assert host.device_wh(0) == pytest.approx(expected)
        shared = sum(each.active_wh + each.resident_wh for each in host.meter.instances if each.device == 0)
        assert shared == pytest.approx(occupied)
        assert shared >= seen
        seen = shared
