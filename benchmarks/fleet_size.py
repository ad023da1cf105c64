"""`python -m benchmarks.fleet_size`: what 1, 10, 100 and 1000 neurons cost cortex.

One other process simulates all neurons, each at its own address. cortex is the real command, on a core of its own if
the machine has two. CPU time comes from the scheduler's nanosecond counters. The time of a decision is measured in this
process, with as many neurons and catalogue models.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.limits import raise_open_files
from benchmarks.loops import run
from benchmarks.scale.decisions import DecisionTimes, p99, time_decisions
from benchmarks.scale.http1 import Answer, Connection, request_bytes, until_answers
from benchmarks.scale.neurons import MODELS, address, model_name
from benchmarks.scale.services import Child, cpu_secs, free_ports, rss_mib, service

CATALOGUE = 100
"""Default number of models in models.toml: half of the fleet's models."""
STATE_CHANGES = 300
SETTLE_SECS = 3.0
CONCURRENCY = 8
WARM_UP = 200
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Figures:
    """Measurements of one fleet size."""

    neurons: int
    all_healthy_secs: float  # from the start of the process
    idle_cpu_ms_per_sec: float
    rss_mib: float
    request_cpu_us: float  # minus what the idle fleet costs
    request_p50_ms: float  # one client, one request after another
    request_p99_ms: float
    watched_cpu_ms_per_sec: float  # idle, with one listener on /fleet/events?changes=true
    watched_p99_ms: float  # as request_p99_ms, with that listener
    models_ms: float
    models_kib: float
    fleet_ms: float
    fleet_kib: float
    metrics_ms: float
    state_p50_ms: float  # from a neuron's event of a model's state to `/v1/models/{id}` showing it
    state_p99_ms: float
    new_model_ms: float  # from the neuron's event to the first answer
    death_secs: float  # from the reset connections to `unhealthy`
    return_secs: float  # from listening again to `healthy`


class Bench:
    """A running cortex with its fleet, and the measurements."""

    def __init__(self, cortex: Child, port: int, metrics_port: int, neurons_port: int, count: int) -> None:
        self._cortex = cortex
        self._port, self._metrics_port, self._neurons_port = port, metrics_port, neurons_port
        self._count = count
        self._front = Connection(_HOST, port)

    async def measure(
        self, started: float, *, settle_secs: float, idle_secs: float, requests: int, protocol_v1: bool
    ) -> Figures:
        """All measurements, in an order in which none affects a later one."""
        await self._until_healthy(self._count, within_secs=180)
        all_healthy = time.perf_counter() - started
        await asyncio.sleep(settle_secs)
        idle_rate = await self._cpu_rate(idle_secs)
        request_cpu = await self._request_cpu(requests, idle_rate)
        latencies = await self._latencies(max(requests // 5, 100))
        watched_rate, watched = await self._watched(idle_secs)
        models, fleet = await self._page("/v1/models"), await self._page("/fleet")
        metrics_page = Connection(_HOST, self._metrics_port)
        metrics = await self._page("/metrics", metrics_page)
        metrics_page.close()
        states = [0.0] * 2 if protocol_v1 else await self._state_changes(STATE_CHANGES)
        return Figures(
            neurons=self._count,
            all_healthy_secs=all_healthy,
            idle_cpu_ms_per_sec=idle_rate * 1000,
            rss_mib=rss_mib(self._cortex.pid),
            request_cpu_us=request_cpu * 1e6,
            request_p50_ms=statistics.median(latencies) * 1000,
            request_p99_ms=p99(latencies) * 1000,
            watched_cpu_ms_per_sec=watched_rate * 1000,
            watched_p99_ms=p99(watched) * 1000,
            models_ms=models[0],
            models_kib=models[1],
            fleet_ms=fleet[0],
            fleet_kib=fleet[1],
            metrics_ms=metrics[0],
            state_p50_ms=statistics.median(states) * 1000,
            state_p99_ms=p99(states) * 1000,
            new_model_ms=await self._new_model() * 1000,
            death_secs=await self._death(),
            return_secs=await self._return(),
        )

    def close(self) -> None:
        self._front.close()

    async def _request_cpu(self, requests: int, idle_rate: float) -> float:
        connections = [Connection(_HOST, self._port) for _ in range(CONCURRENCY)]

        async def work(connection: Connection, first: int, count: int) -> None:
            for number in range(first, first + count):
                answer = await connection.send(chat(model_name(number % self._known_models)))
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status} {answer.body[:300]!r}")

        async def all_of(count: int) -> None:
            share = count // CONCURRENCY
            await asyncio.gather(*(work(c, n * share, share) for n, c in enumerate(connections)))

        await all_of(WARM_UP + CONCURRENCY * self._known_models)  # now cortex knows every endpoint
        before, began = cpu_secs(self._cortex.pid), time.perf_counter()
        await all_of(requests)
        used = cpu_secs(self._cortex.pid) - before - idle_rate * (time.perf_counter() - began)
        for connection in connections:
            connection.close()
        return used / requests

    @property
    def _known_models(self) -> int:
        return min(MODELS, 4 * self._count)

    async def _latencies(self, count: int) -> list[float]:
        return [(await self._front.send(chat(model_name(number % 4)))).secs for number in range(count)]

    async def _cpu_rate(self, secs: float) -> float:
        """CPU seconds used per second without requests."""
        used, began = cpu_secs(self._cortex.pid), time.perf_counter()
        await asyncio.sleep(secs)
        return (cpu_secs(self._cortex.pid) - used) / (time.perf_counter() - began)

    async def _watched(self, secs: float) -> tuple[float, list[float]]:
        """The CPU rate and the latencies while a dashboard is open."""
        reader, writer = await asyncio.open_connection(_HOST, self._port)
        writer.write(request_bytes("GET", "/fleet/events?changes=true", None))

        async def drain() -> None:
            while await reader.read(1 << 20):
                pass

        reading = asyncio.create_task(drain())
        rate = await self._cpu_rate(secs)
        latencies = await self._latencies(100)
        writer.close()
        await reading
        return rate, latencies

    async def _page(self, path: str, connection: Connection | None = None) -> tuple[float, float]:
        """Median time in ms and size in KiB."""
        answers = [await (connection or self._front).get(path) for _ in range(7)]
        return statistics.median(answer.secs for answer in answers) * 1000, len(answers[0].body) / 1024

    async def _tell(self, what: str, **data: object) -> float:
        """Sends an instruction to the simulated neurons, without `node` to the last. Returns when they acted on it."""
        connection = Connection(_HOST, self._neurons_port)
        answer = await connection.post(f"/{what}", {"node": self._count - 1, **data})
        connection.close()
        return float(answer.json().get("told", time.perf_counter()))

    async def _state_changes(self, count: int) -> list[float]:
        """Models fall asleep and wake on different neurons: seconds until cortex shows each change, including the
        request that sees it. Both processes read the same clock."""
        took: list[float] = []
        for number in range(count):
            node = number // 2 * 37 % self._count
            model, status = model_name(4 * node), "loaded" if number % 2 else "sleeping"
            told = await self._tell("status", node=node, model=model, status=status)
            ask = partial(self._front.get, f"/v1/models/{model}")
            seen = await self._until(ask, partial(_shows, node=node_name(node), status=status), pause_secs=0)
            took.append(seen.ended_at - told)
        return took

    async def _new_model(self) -> float:
        """Median seconds until cortex sees a new model on the last neuron."""
        took = []
        for number in range(5):
            name = f"bench/new-{number}"
            request = chat(name)
            telling = asyncio.create_task(self._tell("status", model=name, status="loaded"))
            began = time.perf_counter()
            answer = await self._until(partial(self._front.send, request), lambda found: found.status == 200)
            took.append(answer.ended_at - began)
            await telling
        return statistics.median(took)

    async def _death(self) -> float:
        began = await self._tell("die")
        return await self._until_healthy(self._count - 1, within_secs=60) - began

    async def _return(self) -> float:
        began = await self._tell("revive")
        return await self._until_healthy(self._count, within_secs=60) - began

    async def _until_healthy(self, count: int, *, within_secs: float) -> float:
        ask = partial(self._front.get, "/health")
        found = await self._until(ask, lambda answer: healthy_in(answer) == count, within_secs)
        return found.ended_at

    async def _until(
        self,
        ask: Callable[[], Awaitable[Answer]],
        right: Callable[[Answer], bool],
        within_secs: float = 60,
        *,
        pause_secs: float = 0.005,
    ) -> Answer:
        deadline = time.perf_counter() + within_secs
        while time.perf_counter() < deadline:
            self._cortex.check()
            with suppress(OSError, asyncio.IncompleteReadError):
                answer = await ask()
                if right(answer):
                    return answer
            await asyncio.sleep(pause_secs)
        raise TimeoutError(f"timed out after {within_secs:g} s with {self._count} neurons")


def healthy_in(health: Answer) -> int | None:
    """How many neurons `/health` counts as healthy; None if the answer is an error."""
    nodes = health.json().get("nodes")
    return None if nodes is None else int(nodes["healthy"])


def node_name(index: int) -> str:
    return f"n{index:04d}"


def _shows(entry: Answer, *, node: str, status: str) -> bool:
    return {"node": node, "status": status}.items() <= next(
        (place.items() for place in entry.json().get("locations", ()) if place["node"] == node), set()
    )


def chat(model: str) -> bytes:
    """A request with a prompt of a few hundred bytes."""
    messages = [{"role": "system", "content": "You answer briefly. " * 10}, {"role": "user", "content": "Is it? " * 40}]
    return request_bytes("POST", "/v1/chat/completions", {"model": model, "messages": messages})


async def one_size(
    count: int,
    cpus: Sequence[int],
    *,
    idle_secs: float,
    requests: int,
    protocol_v1: bool = False,
    settle_secs: float = SETTLE_SECS,
    catalogue: int = CATALOGUE,
) -> Figures:
    """Starts a fleet of this size and a cortex, measures, and stops both. cortex has the first core to itself."""
    port, metrics_port, neurons_port = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="fleet-size-") as name:
        directory = Path(name)
        config = write_configuration(directory, count, port, metrics_port, neurons_port, catalogue=catalogue)
        command = [sys.executable, "-m", "benchmarks.scale.neurons", "--count", str(count), "--port", str(neurons_port)]
        command += ["--protocol-v1"] if protocol_v1 else []
        with Child(command, directory / "neurons.log", cpus={cpus[-1]}):
            await until_answers(_HOST, neurons_port, "/", within_secs=30)
            started = time.perf_counter()
            with service("cortex", config, cpus={cpus[0]}) as cortex:
                bench = Bench(cortex, port, metrics_port, neurons_port, count)
                try:
                    return await bench.measure(
                        started,
                        settle_secs=settle_secs,
                        idle_secs=idle_secs,
                        requests=requests,
                        protocol_v1=protocol_v1,
                    )
                finally:
                    bench.close()


def write_configuration(
    directory: Path, count: int, port: int, metrics_port: int, neurons_port: int, *, catalogue: int = CATALOGUE
) -> Path:
    """cortex.toml and models.toml for these numbers of neurons and models."""
    neurons = "".join(
        f'[[neurons]]\nname = "{node_name(index)}"\nendpoint = "http://{address(index)}:{neurons_port}"\n'
        for index in range(count)
    )
    gateway = f'[gateway]\nlisten = "{_HOST}:{port}"\nmetrics_listen = "{_HOST}:{metrics_port}"\n'
    names = [model_name(number) if number < MODELS else f"bench/idle-{number}" for number in range(catalogue)]
    models = "".join(f'[[models]]\nid = "{name}"\nvram_mb = 6000\n' for name in names)
    (directory / "models.toml").write_text(models, encoding="utf-8")
    config = directory / "cortex.toml"
    config.write_text(gateway + neurons, encoding="utf-8")
    return config


COLUMNS = {
    "neurons": "neurons", "all_healthy_secs": "all healthy after s", "idle_cpu_ms_per_sec": "idle CPU ms/s",
    "rss_mib": "RSS MiB", "request_cpu_us": "CPU µs/request", "request_p50_ms": "p50 ms", "request_p99_ms": "p99 ms",
    "watched_cpu_ms_per_sec": "watched CPU ms/s", "watched_p99_ms": "watched p99 ms",
    "models_ms": "/v1/models ms", "models_kib": "KiB", "fleet_ms": "/fleet ms", "fleet_kib": "KiB",
    "metrics_ms": "/metrics ms", "state_p50_ms": "state p50 ms", "state_p99_ms": "state p99 ms",
    "new_model_ms": "new model ms", "death_secs": "death noticed s",
    "return_secs": "return noticed s",
}  # fmt: skip


DECISION_COLUMNS = {
    "nodes": "neurons", "devices": "devices of each", "models": "models",
    "decision_p50_us": "decision p50 µs", "decision_p99_us": "p99 µs",
    "placement_p50_us": "cold placement p50 µs", "placement_p99_us": "p99 µs",
    "list_changed_ms": "`/v1/models` made ms", "list_same_ms": "kept ms", "list_mib": "MiB",
}  # fmt: skip


def table(columns: Mapping[str, str], rows: Sequence[Figures] | Sequence[DecisionTimes]) -> str:
    """The result as Markdown."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        figures = asdict(row)
        cells = (figures[key] for key in columns)
        lines.append("| " + " | ".join(str(c) if isinstance(c, int) else f"{c:.3g}" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fleet_size", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="N")
    parser.add_argument("--idle-secs", type=float, default=10.0, help="how long idling is measured (default 10)")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--catalogue", type=int, default=CATALOGUE, metavar="N", help="models of the catalogue")
    parser.add_argument("--protocol-v1", action="store_true", help="neurons that speak protocol v1 and nothing more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    given = parser.parse_args()
    raise_open_files()  # inherited: a large fleet takes many connections
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})
    rows: list[Figures] = []
    decisions: list[DecisionTimes] = []
    options = {"protocol_v1": given.protocol_v1, "idle_secs": given.idle_secs, "requests": given.requests}
    for size in given.sizes:
        rows.append(run(one_size(size, cpus, catalogue=given.catalogue, **options)))
        decisions += [time_decisions(size, max(given.catalogue, CATALOGUE), devices=devices) for devices in (2, 8)]
        sys.stderr.write(f"{rows[-1]}\n{decisions[-2]}\n{decisions[-1]}\n")
    sys.stdout.write(
        f"load average {os.getloadavg()[0]:.1f}\n\n{table(COLUMNS, rows)}\n\n{table(DECISION_COLUMNS, decisions)}\n"
    )
    if given.json is not None:
        data = {
            "python": platform.python_version(),
            "protocol_v1": given.protocol_v1,
            "sizes": [asdict(row) for row in rows],
            "decisions": [asdict(row) for row in decisions],
        }
        given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
