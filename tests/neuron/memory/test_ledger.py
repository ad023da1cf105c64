"""The bookings of GPU memory: what counts, what is refused, and that no memory is promised twice."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from neuron.gpu.topology import Topology
from neuron.harness.registry import HARNESSES
from neuron.memory.capacity import GpuCapacity, InsufficientVram, held_by, with_capacities
from neuron.memory.ledger import Ledger
from neuron.memory.requirement import MemoryRequirement
from neuron.spec import EngineSpec, InstanceKey
from shared.errors import InvalidRequest
from shared.gpus import DEVICE_MARGIN_MB
from shared.protocol import DeviceHealth
from tests.neuron.hosts import TOTALS, host, measured, spec

ONE, TWO = host("4090"), host("5090", "5090")
FULL = TOTALS["4090"]


def capacity(ledger: Ledger, topology: Topology = ONE, used: int = 0, index: int = 0, reserve: int = 0) -> GpuCapacity:
    return ledger.capacities(topology, measured(topology, {index: used}, reserve=reserve))[index]


def need(wanted: EngineSpec, share: int | None = None, *extra_args: str) -> MemoryRequirement:
    """The memory requirement according to the harness of `wanted`."""
    return HARNESSES[wanted.harness].memory_requirement(wanted, share, [*wanted.args, *extra_args])


def book(
    ledger: Ledger, number: int, share: int | None, topology: Topology = ONE, used: int = 0, **of: Any
) -> list[int]:
    wanted = spec(**{"model_id": f"org/m{number}", **of})
    choice = ledger.book(number, wanted, need(wanted, share), topology, measured(topology, {0: used}))
    return [device.index for device in choice.devices]


# --- capacity of a device


def test_memory_of_a_loading_engine_is_not_counted_twice() -> None:
    """An engine with 20000 MiB booked that holds 7000 so far takes 20000, whether the driver lists its processes or
    not."""
    for known in (True, False):
        ledger = Ledger()
        book(ledger, 1, 20_000)
        if known:
            ledger.update_held(1, {0: 7000})
        found = capacity(ledger, used=7000)
        assert (found.booked_mb, found.held_mb, found.foreign_mb) == (20_000, 7000, 0)
        assert found.bookable_mb == FULL - 20_000


def test_foreign_memory() -> None:
    """Memory of other processes is not bookable; if the driver lists no processes, only use beyond our promises
    counts."""
    ledger = Ledger()
    book(ledger, 1, 20_000)
    ledger.update_held(1, {0: 7000})
    found = capacity(ledger, used=9500)
    assert (found.foreign_mb, found.bookable_mb) == (2500, FULL - 22_500)
    ledger.update_held(1, {})
    found = capacity(ledger, used=20_600)
    assert (found.held_mb, found.foreign_mb, found.bookable_mb) == (20_000, 600, FULL - 20_600)
    assert capacity(Ledger(), used=900).foreign_mb == 900


def test_memory_that_was_foreign_at_the_booking_stays_so() -> None:
    """An engine that has just been booked holds nothing yet; memory that comes into use afterwards is attributed to
    it."""
    ledger = Ledger()
    book(ledger, 1, 10_000, used=3000)
    for used, held in ((3000, 0), (10_000, 7000), (13_000, 10_000)):
        found = capacity(ledger, used=used)
        assert (found.held_mb, found.foreign_mb, found.bookable_mb) == (held, 3000, FULL - 13_000)
    book(ledger, 2, 5000, used=13_500)
    assert capacity(ledger, used=16_000).bookable_mb == FULL - 18_500


def test_measured_footprint_replaces_the_estimate() -> None:
    """It may be smaller or larger than the promise; later measurements replace it again."""
    ledger = Ledger()
    book(ledger, 1, 20_000)
    for footprint in (14_000, 21_000, 21_500):
        ledger.settle(1, {0: footprint})
        found = capacity(ledger, used=footprint)
        assert (found.booked_mb, found.held_mb, found.bookable_mb) == (footprint, footprint, FULL - footprint)


def test_growth_seen_before_the_load_is_done_counts() -> None:
    """More than was promised counts as held; if the driver reports nothing, the promise counts."""
    ledger = Ledger()
    book(ledger, 1, 10_000)
    ledger.update_held(1, {0: 12_000})
    assert capacity(ledger, used=12_000).bookable_mb == FULL - 12_000
    ledger.settle(1, {})
    found = capacity(ledger, used=12_000)
    assert (found.booked_mb, found.foreign_mb) == (10_000, 2000)


def test_memory_of_a_stopping_engine_can_be_booked() -> None:
    """It is counted apart from free memory. Once the engine is gone, what the driver still reports counts as
    foreign."""
    ledger = Ledger()
    book(ledger, 1, 20_000)
    ledger.settle(1, {0: 20_000})
    with pytest.raises(InsufficientVram):
        book(ledger, 2, 18_000, used=20_000)
    ledger.mark_stopping(1)
    found = capacity(ledger, used=20_000)
    assert (found.booked_mb, found.bookable_mb, found.stopping_mb) == (0, FULL, 20_000)
    assert book(ledger, 2, 18_000, used=20_000) == [0]
    ledger.release(1)
    found = capacity(ledger, used=300)
    assert (found.held_mb, found.foreign_mb, found.bookable_mb) == (300, 0, FULL - 18_000)


def test_a_start_waits_for_stopping_engines() -> None:
    """Until they are gone, even if they hold nothing any more. Earlier bookings get freed memory first, and nothing
    waits longer than necessary."""
    ledger = Ledger()
    book(ledger, 1, 20_000, model_id="org/1")
    ledger.settle(1, {0: 20_000})
    assert ledger.counts_on(1, ONE, measured(ONE, {0: 20_000})) == ()
    assert not ledger.any_stops()
    ledger.mark_stopping(1)
    assert ledger.any_stops()
    book(ledger, 2, 4000, used=20_000, model_id="org/2")
    book(ledger, 3, 18_000, used=20_000, model_id="org/3")
    used = measured(ONE, {0: 20_000})
    assert [ledger.counts_on(number, ONE, used) for number in (1, 2, 3, 9)] == [(), (), ("org/1",), ()]
    ledger.update_held(2, {0: 4000})
    for mb in (24_000, 4000):
        assert ledger.counts_on(3, ONE, measured(ONE, {0: mb})) == ("org/1",)
    ledger.release(1)
    assert not ledger.any_stops()
    assert ledger.counts_on(3, ONE, measured(ONE, {0: 4000})) == ()
    assert ledger.lacks_memory(3, ONE, measured(ONE, {0: 24_000}))
    assert not ledger.lacks_memory(3, ONE, measured(ONE, {0: 4000}))


def test_a_start_waits_where_nothing_is_measured() -> None:
    """The bookings say that there is no room for both."""
    ledger = Ledger()
    book(ledger, 1, 20_000, model_id="org/1")
    ledger.mark_stopping(1)
    book(ledger, 2, 4000, model_id="org/2")
    book(ledger, 3, 18_000, model_id="org/3")
    assert [ledger.counts_on(number, ONE, measured(ONE, {0: 0})) for number in (2, 3)] == [(), ("org/1",)]
    ledger.release(1)
    assert ledger.counts_on(3, ONE, measured(ONE, {0: 0})) == ()
    assert not ledger.lacks_memory(3, ONE, measured(ONE, {0: 0}))


@pytest.mark.parametrize("where", [host(), host("4090", d0={"vram_total_mb": 0})], ids=["no device", "unified memory"])
def test_a_start_waits_where_memory_is_unknown(where: Topology) -> None:
    """Without a size nothing shows that there is room for two. A loaded engine is not waited for."""
    ledger = Ledger()
    for number in (1, 2):
        book(ledger, number, 1000, where, model_id=f"org/{number}")
    assert ledger.counts_on(2, where, measured(where)) == ()
    ledger.mark_stopping(1)
    assert ledger.counts_on(2, where, measured(where)) == ("org/1",)
    ledger.release(1)
    assert ledger.counts_on(2, where, measured(where)) == ()
    assert not ledger.lacks_memory(2, where, measured(where))


def test_stopping_engine_whose_processes_are_not_listed() -> None:
    """A container does not list them: the engine is assumed to hold what is in use, up to its promise."""
    ledger = Ledger()
    book(ledger, 1, 15_000)
    book(ledger, 2, 5000)
    ledger.mark_stopping(1)
    found = capacity(ledger, used=16_000)
    assert (found.stopping_mb, found.held_mb, found.foreign_mb) == (15_000, 16_000, 0)
    assert found.bookable_mb == FULL - 5000


def test_real_devices_keep_a_margin_and_the_drivers_reserve() -> None:
    """What NVML counts as neither used nor free is unattributed; a CUDA context needs some MiB beside the share."""
    real = host("4090", simulated=False)
    assert capacity(Ledger(), real, reserve=400).bookable_mb == FULL - 400 - DEVICE_MARGIN_MB
    assert capacity(Ledger(), real, used=FULL).bookable_mb == 0
    assert Ledger().capacities(ONE, [DeviceHealth(index=0)])[0].bookable_mb == FULL  # a driver that reports nothing


def test_health_figures() -> None:
    """The figures of `/health`; an unusable device has nothing bookable."""
    topology = host("5090", "5090", d1={"mig_mode": True})
    ledger = Ledger()
    book(ledger, 1, 8000, topology)
    live = measured(topology, {0: 9000})
    figures = with_capacities(live, ledger.capacities(topology, live))
    reported = [(item.vram_booked_mb, item.vram_foreign_mb, item.vram_bookable_mb) for item in figures]
    assert reported == [(8000, 1000, TOTALS["5090"] - 9000), (0, 0, 0)]
    assert with_capacities(live, ()) == live


def test_memory_held_by_processes() -> None:
    """Summed by device, without devices that list none of the processes, which does not mean 0."""
    usage = {0: {7: 100, 8: 5, 9: 1}, 1: {7: 50}, 2: {5: 70}}
    assert held_by({7, 8}, usage) == {0: 105, 1: 50}


def test_default_fraction_is_of_what_cuda_sees() -> None:
    """A desktop's small card: NVML counts the driver's reserve into the total, CUDA and so vLLM do not."""
    small = host("3060", simulated=False)
    wanted = spec(harness="vllm")
    choice = Ledger().book(1, wanted, need(wanted), small, measured(small, {0: 200}, reserve=300))
    assert choice.booked_mb == (11_029,)


# --- refusals


def test_refusal_names_the_figures() -> None:
    """The message says what is needed, and for each device what is available and what uses the rest; so do the
    fields."""
    topology = host("4090", "4090", "3060", d1={"lost": "fell off the bus"})
    ledger = Ledger()
    book(ledger, 1, 18_000, topology, model_id="org/a", devices=(0,))
    with pytest.raises(InsufficientVram) as refused:
        ledger.book(2, spec(2, "org/b"), MemoryRequirement(12_000), topology, measured(topology, {0: 21_464, 2: 288}))
    error = refused.value
    assert (error.status, error.code) == (409, "insufficient_vram")
    assert error.message == (
        "'org/b' needs 12000 MiB on each of 2 devices; "
        "device 0 (4090): 3100 of 24564 MiB available (18000 booked for 'org/a', 3464 used by other processes); "
        "device 1 (4090) cannot be used: fell off the bus; "
        "device 2 (3060): 12000 of 12288 MiB available (288 used by other processes)"
    )
    assert error.body()["error"]["devices"][0] == {
        "index": 0,
        "total_mb": 24_564,
        "booked_mb": 18_000,
        "foreign_mb": 3464,
        "bookable_mb": 3100,
        "unusable": None,
        "needed_mb": 12000,
    }


def test_named_devices_that_are_full_are_refused() -> None:
    """The load is refused even if others have enough memory; the message mentions only the named ones."""
    ledger = Ledger()
    book(ledger, 1, 30_000, TWO, devices=(0,))
    with pytest.raises(InsufficientVram) as refused:
        book(ledger, 2, 8000, TWO, devices=(0,))
    assert "device 0 (5090): 2607 of 32607" in refused.value.message
    assert "device 1" not in refused.value.message
    assert book(ledger, 2, 8000, TWO) == [1]


def test_what_is_booked_when_nothing_is_known() -> None:
    """vLLM books its default fraction, the simulation its default; arguments override both."""
    ledger = Ledger()
    book(ledger, 1, None, harness="vllm")
    assert capacity(ledger).booked_mb == 22_599  # 92%
    with pytest.raises(InsufficientVram, match="'org/m2' needs 92% of the memory on one device"):
        book(ledger, 2, None, harness="vllm")
    assert book(ledger, 3, None) == [0]
    assert capacity(ledger).booked_mb == 22_599 + 1024
    ledger = Ledger()
    for number in (1, 2):
        wanted = spec(model_id=f"org/m{number}", harness="vllm", args=("--gpu-memory-utilization", "0.9"))
        choice = ledger.book(number, wanted, need(wanted, None, "--gpu-memory-utilization=0.5"), ONE, measured(ONE))
        assert choice.booked_mb == (12_282,)
    assert capacity(ledger).bookable_mb == 0


def test_device_that_was_lost_since_the_check() -> None:
    """A spec checked earlier is refused with the reason."""
    topology = host("5090", "5090", d0={"lost": "fell off the bus"})
    for wanted in (spec(devices=(0,)), spec(2), spec(devices=(7,))):
        with pytest.raises(InvalidRequest, match=r"fell off the bus|no device 7"):
            Ledger().book(1, wanted, MemoryRequirement(1000), topology, measured(topology))


def test_refused_load_books_nothing() -> None:
    """The memory stays available for others and for another attempt."""
    ledger = Ledger()
    with pytest.raises(InsufficientVram):
        book(ledger, 1, FULL + 1)
    assert capacity(ledger).bookable_mb == FULL
    assert book(ledger, 1, FULL) == [0]


def test_host_without_devices_books_nothing() -> None:
    """Any number of engines of any size share a CPU host."""
    ledger = Ledger()
    assert book(ledger, 1, 10**6, Topology()) == book(ledger, 2, None, Topology(), harness="vllm") == []
    assert ledger.capacities(Topology(), []) == ()


def test_unequal_cards_are_booked_as_vllm_fills_them() -> None:
    """The same fraction is more on the larger card, until the measured footprint replaces it."""
    topology = host("4090", "5090")
    ledger = Ledger()
    wanted = spec(2, harness="vllm")
    choice = ledger.book(1, wanted, need(wanted, 12_282), topology, measured(topology))
    assert choice.booked_mb == (12_282, 16_304)
    ledger.settle(1, {0: 12_000, 1: 12_500})
    live = measured(topology, {0: 12_000, 1: 12_500})
    assert [found.bookable_mb for found in ledger.capacities(topology, live)] == [12_564, 20_107]


# --- sleeping, adopting


def test_sleeping_engine_keeps_only_what_it_holds() -> None:
    """It gets the rest back when it wakes, unless others have booked or taken it."""
    ledger = Ledger()
    book(ledger, 1, 20_000)
    ledger.settle(1, {0: 20_500})
    ledger.shrink_to_sleep(1, {0: 900})
    assert capacity(ledger, used=900).bookable_mb == FULL - 900
    ledger.settle(1, {0: 950})
    book(ledger, 2, 10_000, used=950)
    with pytest.raises(InsufficientVram, match=r"needs 19550 MiB more on device 0 to wake.*10000 booked for 'org/m2'"):
        ledger.book_wake(1, ONE, measured(ONE, {0: 950}))
    assert capacity(ledger, used=950).booked_mb == 10_950
    ledger.release(2)
    with pytest.raises(InsufficientVram, match="used by other processes"):
        ledger.book_wake(1, ONE, measured(ONE, {0: 9000}))
    ledger.book_wake(1, ONE, measured(ONE, {0: 950}))
    ledger.update_held(1, {0: 5000})
    assert capacity(ledger, used=5000).bookable_mb == FULL - 20_500
    ledger.book_wake(1, ONE, measured(ONE, {0: 5000}))  # awake: nothing to do
    ledger.settle(1, {0: 20_400})
    assert capacity(ledger, used=20_400).booked_mb == 20_400


def test_sleeping_engine_without_figures_keeps_its_promise() -> None:
    """If the driver does not report its memory, it may have released nothing."""
    ledger = Ledger()
    book(ledger, 1, 20_000)
    ledger.shrink_to_sleep(1, {})
    assert capacity(ledger, used=900).bookable_mb == FULL - 20_000
    ledger.book_wake(1, ONE, measured(ONE, {0: 900}))


def test_adopted_engine() -> None:
    """It is booked without a check, even beyond what the device has."""
    ledger = Ledger()
    ledger.adopt(1, InstanceKey("org/a"), (0,), 30_000)
    assert capacity(ledger, used=20_000).bookable_mb == 0
    ledger.settle(1, {0: 20_000})
    assert capacity(ledger, used=20_000).bookable_mb == FULL - 20_000
    ledger.adopt(2, InstanceKey("org/b"), (0,), None)
    found = capacity(ledger, used=22_000)
    assert (found.foreign_mb, found.bookable_mb) == (2000, FULL - 22_000)
    ledger.settle(2, {0: 2000})
    found = capacity(ledger, used=22_000)
    assert (found.foreign_mb, found.booked_by) == (0, (("org/a", 20_000), ("org/b", 2000)))


def test_late_calls_for_engines_that_are_gone() -> None:
    """A measurement that arrives after the release changes nothing."""
    ledger = Ledger()
    for late in (ledger.update_held, ledger.settle, ledger.shrink_to_sleep):
        late(9, {0: 5000})
    ledger.mark_stopping(9)
    ledger.release(9)
    ledger.book_wake(9, ONE, measured(ONE))
    assert capacity(ledger).bookable_mb == FULL


# --- random sequences of events, compared with a model


@dataclass
class Held:
    """What is promised to an engine and what it really holds, in MiB by device."""

    model_id: str
    promised: dict[int, int]
    held: dict[int, int]
    stopping: bool = False
    settled: bool = False

    def unfilled(self, index: int) -> int:
        return 0 if self.stopping else max(0, self.promised.get(index, 0) - self.held.get(index, 0))


class Model:
    """The true state of a host, and a ledger that is informed of it."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.topology = host(*source.choices(["5090", "4090", "3060"], k=source.randint(1, 3)))
        self.totals = {device.index: device.vram_total_mb for device in self.topology.devices}
        self.ledger = Ledger()
        self.engines: dict[int, Held] = {}
        self.foreign = dict.fromkeys(self.totals, 0)

    def used(self, index: int) -> int:
        return self.foreign[index] + sum(each.held.get(index, 0) for each in self.engines.values())

    def spare(self, index: int) -> int:
        """Memory that no lasting engine or other process uses and that is not promised; below 0 when other processes
        took what was promised."""
        freed = sum(each.held.get(index, 0) for each in self.engines.values() if each.stopping)
        unfilled = sum(each.unfilled(index) for each in self.engines.values())
        return self.totals[index] - self.used(index) - unfilled + freed

    def health(self) -> list[DeviceHealth]:
        return measured(self.topology, {index: self.used(index) for index in self.totals})

    def book(self, number: int) -> None:
        share, count = self.source.randint(200, 14_000), self.source.randint(1, len(self.totals))
        model_id = f"org/{self.source.choice('abc')}"
        named = tuple(self.source.sample(list(self.totals), count)) if self.source.random() < 0.2 else None
        wanted = spec(count, model_id=model_id, instance=str(number), devices=named)
        spare = {index: self.spare(index) for index in named or self._without(model_id)}
        try:
            choice = self.ledger.book(number, wanted, MemoryRequirement(share), self.topology, self.health())
        except InsufficientVram:
            assert sum(mb >= share for mb in spare.values()) < count
            return
        assert all(spare[device.index] >= share for device in choice.devices)
        promised = {device.index: share for device in choice.devices}
        self.engines[number] = Held(model_id, promised, dict.fromkeys(promised, 0))

    def _without(self, model_id: str) -> set[int]:
        """The devices without a lasting engine of the model."""
        lasting = [each for each in self.engines.values() if each.model_id == model_id and not each.stopping]
        return set(self.totals).difference(*(each.promised for each in lasting))

    def fill(self, number: int, engine: Held) -> None:
        if not engine.settled:
            engine.held = {index: self.source.randint(0, mb) for index, mb in engine.promised.items()}
            self.ledger.update_held(number, engine.held)

    def measure(self, number: int, engine: Held) -> None:
        if not engine.stopping:
            engine.held = {index: self.source.randint(mb // 2, mb) for index, mb in engine.promised.items()}
            engine.promised, engine.settled = dict(engine.held), True
            self.ledger.settle(number, engine.held)

    def stop(self, number: int, engine: Held) -> None:
        engine.stopping = True
        self.ledger.mark_stopping(number)

    def release(self, number: int, engine: Held) -> None:
        if engine.stopping:
            del self.engines[number]
            self.ledger.release(number)

    def foreign_change(self) -> None:
        """Another process allocates or frees memory; then loading engines are measured, as before a booking."""
        index = self.source.choice(list(self.totals))
        free = self.totals[index] - self.used(index) + self.foreign[index]
        self.foreign[index] = self.source.randint(0, max(0, min(4000, free)))
        for number, engine in self.engines.items():
            if not engine.settled:
                self.ledger.update_held(number, engine.held)

    def step(self, number: int) -> None:
        kind = self.source.choice(["book", "book", "fill", "measure", "stop", "release", "foreign"])
        if kind == "book":
            self.book(number)
        elif kind == "foreign":
            self.foreign_change()
        elif self.engines:
            some = self.source.choice(list(self.engines))
            {"fill": self.fill, "measure": self.measure, "stop": self.stop, "release": self.release}[kind](
                some, self.engines[some]
            )

    def check(self) -> None:
        for found in self.ledger.capacities(self.topology, self.health()):
            assert found.bookable_mb == max(0, self.spare(found.index))
            assert found.foreign_mb == self.foreign[found.index]


@pytest.mark.parametrize("seed", range(60))
def test_memory_is_never_promised_twice(seed: int) -> None:
    """Bookings of three models' instances, allocations, measurements, stops and other processes in any order: what is
    booked fits beside everything in use or promised, no device gets a second instance of a model unless it is named,
    what is refused does not fit, and in the end all memory is free."""
    model = Model(random.Random(seed))
    for number in range(200):
        model.step(number)
        model.check()
    for number, engine in list(model.engines.items()):
        model.stop(number, engine)
        model.release(number, engine)
    model.check()
    assert not any(found.booked_mb for found in model.ledger.capacities(model.topology, model.health()))


# --- instances of one model


def instance(name: str, **fields: Any) -> EngineSpec:
    return spec(model_id="org/several", instance=name, **fields)


def book_instance(ledger: Ledger, number: int, **fields: Any) -> tuple[int, ...]:
    """Books 2000 MiB for the instance that is named as its booking."""
    wanted = instance(str(number), **fields)
    choice = ledger.book(number, wanted, MemoryRequirement(2000), TWO, measured(TWO))
    return tuple(device.index for device in choice.devices)


def test_no_device_is_chosen_for_two_instances() -> None:
    """The error names the instance that holds each device and what to do. A load that names the device gets it, and so
    does another model."""
    ledger = Ledger()
    assert {book_instance(ledger, 1), book_instance(ledger, 2)} == {(0,), (1,)}
    ledger.shrink_to_sleep(1, {0: 100})
    with pytest.raises(InsufficientVram) as refused:
        book_instance(ledger, 3)
    for name in ("1", "2"):
        assert f"it holds instance {name} of this model: name the device in the load to share it" in str(refused.value)
    assert "permanent" not in refused.value.extra
    assert book_instance(ledger, 4, devices=(0,)) == (0,)
    assert book(ledger, 5, 2000, TWO) != []
    with pytest.raises(InsufficientVram):
        book_instance(ledger, 6, tensor_parallel=2)


def test_device_of_a_stopping_instance_is_chosen_last() -> None:
    """It is chosen only if no other is left, and then the start waits; not if the load names it, nor for the same
    instance elsewhere."""
    ledger = Ledger()
    assert book_instance(ledger, 1, devices=(0,)) == (0,)
    ledger.mark_stopping(1)
    assert book(ledger, 2, 25_000, TWO, devices=(1,)) == [1]  # makes device 1 the tighter fit for nothing
    assert book_instance(ledger, 3) == (1,)
    assert ledger.counts_on(3, TWO, measured(TWO)) == ()
    assert book_instance(ledger, 4) == (0,)
    assert ledger.counts_on(4, TWO, measured(TWO)) == ("org/several instance 1",)
    assert book_instance(ledger, 5, devices=(0,)) == (0,)
    assert ledger.counts_on(5, TWO, measured(TWO)) == ()
    ledger.release(1)
    assert ledger.counts_on(4, TWO, measured(TWO)) == ()


# --- displacing others


@pytest.mark.parametrize(
    ("wanted", "devices", "displaced"),
    [
        (20_000, None, [2]),  # the first that is enough
        (20_000, (0,), [1]),  # 2 is on another device
        (30_000, None, [3, 2]),
        (30_000, (0,), []),  # 4 stays there
        (40_000, None, []),
    ],
)
def test_no_engine_is_displaced_needlessly(wanted: int, devices: tuple[int, ...] | None, displaced: list[int]) -> None:
    """Candidates in the order of preference; one on another device, or too small to help, is left alone."""
    ledger = Ledger()
    for number, share, index in ((1, 20_000, 0), (2, 20_000, 1), (3, 10_000, 1), (4, 10_000, 0)):
        book(ledger, number, share, TWO, devices=(index,))
    found = ledger.to_displace([3, 2, 1], spec(devices=devices), MemoryRequirement(wanted), TWO, measured(TWO))
    assert found == displaced
