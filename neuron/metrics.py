"""`GET /metrics` in Prometheus text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from neuron.gpu.device_watch import faults_of
from neuron.gpu.energy.sharing import JOULES_PER_WH
from neuron.lifecycle.instance_state import InstanceState
from neuron.lifecycle.states import State
from shared.protocol import Device, DeviceHealth, HostMemoryHealth, InstanceEnergy, SpareView

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LOAD_BUCKETS = (1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200, 1800)
_MIB = 2**20


class NeuronMetrics:
    """Counters of this neuron, in a registry of their own, so that one process can hold several neurons."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._load_seconds = Histogram(
            "neuron_model_load_seconds",
            "Time from the start of an engine process to its first healthy answer.",
            ["model"],
            buckets=_LOAD_BUCKETS,
            registry=self._registry,
        )
        self._restarts = prometheus_client.Counter(
            "neuron_engine_restarts",
            "Engines started again after they ended unexpectedly.",
            ["model"],
            registry=self._registry,
        )

    def loaded(self, model_id: str, seconds: float) -> None:
        """Counts a load that took `seconds`."""
        self._load_seconds.labels(model_id).observe(seconds)

    def restarted(self, model_id: str) -> None:
        """Counts an engine that is started again after it died."""
        self._restarts.labels(model_id).inc()

    def known(self, model_id: str) -> None:
        """Creates the model's counters, so that they start at zero instead of at their first event."""
        self._restarts.labels(model_id)

    def render(
        self,
        models: Sequence[InstanceState],
        devices: Sequence[Device],
        health: Sequence[DeviceHealth],
        spares: Iterable[SpareView],
        host: HostMemoryHealth | None = None,
        *,
        energy: Iterable[InstanceEnergy] = (),
    ) -> bytes:
        """The metrics page: the counters, and the given state of models, devices, spare processes, the host's RAM and
        the energy of instances."""
        now = CollectorRegistry()
        families = [*_engine_states(models), *_device_gauges(devices, health), _spare_gauge(spares)]
        families += [_engine_memory(models, devices), _xids(devices, health)]
        now.register(_Snapshot([*families, *_ram_gauges(models, host), *_energy_counters(devices, health, energy)]))
        return generate_latest(self._registry) + generate_latest(now)


class _Snapshot(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _engine_states(models: Sequence[InstanceState]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "neuron_engine_state", "How many engines of a model are in a state.", labels=["model", "state"]
    )
    counts = Counter((model.model_id, model.state) for model in models)
    for model_id in dict.fromkeys(model.model_id for model in models):
        for state in State:
            states.add_metric([model_id, state.value], counts[model_id, state])
    yield states
    engines = GaugeMetricFamily(
        "neuron_instance_state", "1 for the state an engine is in.", labels=["model", "engine", "state"]
    )
    for model in models:
        for state in State:
            engines.add_metric([*model.key, state.value], float(model.state is state))
    yield engines


def _spare_gauge(spares: Iterable[SpareView]) -> Metric:
    memory = GaugeMetricFamily(
        "neuron_spare_memory_bytes", "Host memory of the process that waits to become an engine.", labels=["harness"]
    )
    for spare in spares:
        memory.add_metric([spare.harness], float((spare.memory_mb or 0) * _MIB))
    return memory


def _ram_gauges(models: Sequence[InstanceState], host: HostMemoryHealth | None) -> Iterator[Metric]:
    if host is None:
        return
    columns = (
        ("total", "RAM of the host, or of neuron's container.", host.ram_total_mb),
        ("used", "RAM in use, foreign processes included.", host.ram_used_mb),
        ("booked", "RAM promised to engines of this neuron.", host.ram_booked_mb),
        ("foreign", "RAM in use by processes that are not this neuron's.", host.ram_foreign_mb),
    )
    for name, text, mib in columns:
        yield GaugeMetricFamily(f"neuron_host_memory_{name}_bytes", text, value=mib * _MIB)
    engines = GaugeMetricFamily(
        "neuron_engine_host_memory_bytes",
        "RAM that the processes of an engine use, where it is counted.",
        labels=["model", "engine"],
    )
    for model in models:
        if model.engine is not None and model.engine.ram is not None:
            engines.add_metric([*model.key], float(model.engine.ram.used_mb * _MIB))
    yield engines


def _device_gauges(devices: Sequence[Device], health: Sequence[DeviceHealth]) -> Iterator[Metric]:
    uuids = {device.index: device.uuid or "" for device in devices}
    total = {device.index: device.vram_total_mb * _MIB for device in devices}
    used = {item.index: item.vram_used_mb * _MIB for item in health}
    columns: list[tuple[str, str, dict[int, float]]] = [
        ("memory_total_bytes", "Memory of the device.", dict(total)),
        ("memory_used_bytes", "Memory in use, foreign processes included.", dict(used)),
        ("memory_free_bytes", "Memory that nothing uses.", _bytes(health, "vram_free_mb")),
        ("memory_booked_bytes", "Promised to engines of this neuron.", _bytes(health, "vram_booked_mb")),
        ("memory_foreign_bytes", "In use by processes that are not this neuron's.", _bytes(health, "vram_foreign_mb")),
        ("utilization_percent", "Share of time in which a kernel ran.", _given(health, "utilization_pct")),
        ("temperature_celsius", "Temperature of the GPU.", _given(health, "temp_c")),
        ("power_watts", "Power draw.", _given(health, "power_w")),
    ]
    for name, text, values in columns:
        family = GaugeMetricFamily(f"neuron_device_{name}", text, labels=["index", "uuid"])
        for index, value in values.items():
            family.add_metric([str(index), uuids.get(index, "")], value)
        yield family
    family = GaugeMetricFamily(
        "neuron_device_fault", "1 while nothing can be placed on the device.", labels=["index", "uuid", "reason"]
    )
    for index, reason in faults_of(devices, health).items():
        family.add_metric([str(index), uuids.get(index, ""), reason], 1)
    yield family


def _engine_memory(models: Sequence[InstanceState], devices: Sequence[Device]) -> Metric:
    uuids = {device.index: device.uuid or "" for device in devices}
    memory = GaugeMetricFamily(
        "neuron_engine_device_memory_bytes",
        "Memory of the device that an engine holds, as last measured.",
        labels=["model", "engine", "index", "uuid"],
    )
    for model in models:
        for index, mib in model.device_memory_mb().items():
            memory.add_metric([*model.key, str(index), uuids.get(index, "")], float(mib * _MIB))
    return memory


def _xids(devices: Sequence[Device], health: Sequence[DeviceHealth]) -> Metric:
    uuids = {device.index: device.uuid or "" for device in devices}
    xids = CounterMetricFamily(
        "neuron_device_xids", "Errors that the driver has reported.", labels=["index", "uuid", "xid"]
    )
    for item in health:
        for xid, count in item.xids.items():
            xids.add_metric([str(item.index), uuids.get(item.index, ""), str(xid)], count)
    return xids


def _energy_counters(
    devices: Sequence[Device], health: Sequence[DeviceHealth], energy: Iterable[InstanceEnergy]
) -> Iterator[Metric]:
    uuids = {device.index: device.uuid or "" for device in devices}
    metered = CounterMetricFamily(
        "neuron_device_energy_joules", "Energy that the device has used.", labels=["index", "uuid"]
    )
    for index, wh in _given(health, "energy_wh").items():
        metered.add_metric([str(index), uuids.get(index, "")], wh * JOULES_PER_WH)
    total: defaultdict[tuple[str, str], float] = defaultdict(float)
    for each in energy:
        total[each.id, "active"] += each.active_wh
        total[each.id, "resident"] += each.resident_wh
    shared = CounterMetricFamily(
        "neuron_model_energy_joules",
        "What the engines of a model have used of it: for requests, and of the draw of an idle device.",
        labels=["model", "kind"],
    )
    for key, wh in total.items():
        shared.add_metric(key, wh * JOULES_PER_WH)
    yield from (metered, shared)


def _bytes(health: Sequence[DeviceHealth], field: str) -> dict[int, float]:
    return {index: mib * _MIB for index, mib in _given(health, field).items()}


def _given(health: Sequence[DeviceHealth], field: str) -> dict[int, float]:
    """The field by device index, for the devices whose driver gives it."""
    return {item.index: value for item in health if (value := getattr(item, field)) is not None}
