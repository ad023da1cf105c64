"""Several worker processes on one port: the control decides for all and replaces those that die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
import tomli_w

from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import InFlight
from cortex.routing.replica import Route
from cortex.workers import __main__ as worker_process
from cortex.workers.messages import Collect, Counted, DownChanged, Resolved, RouteUnused, Setup, ToWorker
from cortex.workers.remote_control import RemoteControl
from tests.cortex.fleets import replica as made_replica
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import bounded
from tests.processes import alive, descendants

MODEL = "org/small"
SHORT = {"id": "org/short", "max_model_len": 100}
TOP = Path(__file__).parents[3]


def _is_worker(pid: int) -> bool:
    try:
        return b"cortex.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    """Polls a condition that other processes bring about. The test's timeout is the deadline."""
    while not condition():  # noqa: ASYNC110 - another process sets no event of ours
        await asyncio.sleep(0.02)


class Workers:
    """A cortex with two workers on a port of its choice, and its log."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        match = re.search(r"cortex listening on (\S+),", self.log())
        return "" if match is None else match[1]

    def pids(self) -> list[int]:
        """The ids of the worker processes."""
        return sorted(pid for pid in descendants(self.process.pid) if _is_worker(pid))

    async def ask(self) -> tuple[int, str]:
        """A chat on a connection of its own: status, and whether it was a cold start."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        async with aiohttp.ClientSession() as http, http.post(f"{self.url}/v1/chat/completions", json=body) as answer:
            await answer.read()
            return answer.status, answer.headers.get("x-cortex-cold-start", "")


@pytest.fixture
async def workers(tmp_path: Path, benjy: V1Neuron) -> AsyncIterator[Workers]:
    config = {
        "gateway": {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "drain_timeout_secs": 5},
        "poll": {"interval_secs": 0.05},
        "neurons": [{"name": benjy.name, "endpoint": benjy.url}],
    }
    (tmp_path / "cortex.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    (tmp_path / "models.toml").write_text(tomli_w.dumps({"models": [{"id": MODEL}, SHORT]}), encoding="utf-8")
    log = tmp_path / "cortex.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "cortex", "serve", "--config", str(tmp_path / "cortex.toml"), "--workers", "2"),
            stdout=output,
            stderr=output,
            cwd=TOP,
        )
    running = Workers(process, log)
    try:
        await until(lambda: running.url != "" and "neuron benjy is healthy" in running.log())
        yield running
    finally:
        if process.returncode is None:
            process.terminate()
        with contextlib.suppress(ProcessLookupError):
            await bounded(process.wait(), secs=20)


async def test_first_requests_of_all_workers_share_one_load(workers: Workers, benjy: V1Neuron) -> None:
    """The kernel spreads fifty requests over both workers: one load at the neuron answers all."""
    benjy.load_gate.clear()
    asking = [asyncio.create_task(workers.ask()) for _ in range(50)]
    await benjy.load_started.wait()
    benjy.load_gate.set()
    answers = await asyncio.gather(*asking)
    assert {status for status, _ in answers} == {200}
    assert (200, "true") in answers
    assert len(benjy.loads) == 1
    by_worker = set(re.findall(r" id=(\w{20})", await _log_with(workers, 50)))
    assert len(by_worker) == 2, "both workers took part"


async def _log_with(workers: Workers, lines: int) -> str:
    """The log, once it has that many access lines."""
    await until(lambda: workers.log().count("POST /v1/chat/completions 200") >= lines)
    return workers.log()


async def test_request_that_cannot_fit_costs_no_load(workers: Workers, benjy: V1Neuron) -> None:
    """The worker asks how much context the model can have."""
    body = {"model": SHORT["id"], "prompt": "hi", "max_tokens": 101}
    async with aiohttp.ClientSession() as http, http.post(f"{workers.url}/v1/completions", json=body) as answer:
        assert answer.status == 400
        assert "max_tokens=101 cannot be greater than max_model_len=100" in await answer.text()
    assert not benjy.loads


async def test_worker_that_dies_is_replaced(workers: Workers, benjy: V1Neuron) -> None:
    """Its socket stays open in the meantime: new connections wait and none is refused."""
    benjy.models[MODEL] = "loaded"
    first, second = workers.pids()
    os.kill(first, signal.SIGKILL)
    answers = await asyncio.gather(*(workers.ask() for _ in range(20)))
    assert {status for status, _ in answers} == {200}
    await until(lambda: len(workers.pids()) == 2)
    assert second in workers.pids()
    assert "restarting in" in workers.log()


async def test_metrics_and_fleet_cover_all_workers(workers: Workers, benjy: V1Neuron) -> None:
    """Counts are summed over all workers."""
    benjy.models[MODEL] = "loaded"
    assert {status for status, _ in await asyncio.gather(*(workers.ask() for _ in range(30)))} == {200}
    metrics = _metrics_port(workers)
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{metrics}/metrics") as answer:
            text = await answer.text()
        assert f'cortex_requests_total{{model="{MODEL}",node="benjy",status="200"}} 30.0' in text
        async with http.get(f"{workers.url}/v1/models") as answer:
            assert [entry["id"] for entry in (await answer.json())["data"]] == [MODEL, SHORT["id"]]


def _metrics_port(workers: Workers) -> int:
    """The control's port for metrics, found in the kernel's list of sockets."""
    pid = workers.process.pid
    inodes = {
        match[1]
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if (match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd))) is not None  # noqa: PTH115
    }
    shared = int(workers.url.rpartition(":")[2])
    for line in Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        port = int(fields[1].partition(":")[2], 16)
        if fields[3] == "0A" and fields[9] in inodes and port != shared:
            return port
    raise AssertionError("no metrics port")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_workers_end_with_their_control(workers: Workers, how: signal.Signals) -> None:
    """No worker survives its control process, however that exits."""
    pids = workers.pids()
    assert len(pids) == 2
    workers.process.send_signal(how)
    await workers.process.wait()
    await until(lambda: not alive(pids))


async def test_port_of_another_cortex_is_not_shared(workers: Workers, tmp_path: Path) -> None:
    """A second cortex with workers finds the address in use, although workers share the port."""
    port = workers.url.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "cortex", "serve", "--config", str(tmp_path / "cortex.toml"), "--workers", "2"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd=TOP,
        env={**os.environ, "CORTEX_GATEWAY__LISTEN": f"127.0.0.1:{port}"},
    )
    _, error = await bounded(process.communicate(), secs=20)
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in error.decode()


async def test_request_that_was_just_given_an_engine_is_counted() -> None:
    """The control asks for counts before it evicts a model; the answer includes requests routed before."""
    replica = made_replica(MODEL, "benjy", "http://127.0.0.1:1")
    setup = Setup(config="{}", models=[MODEL], aliases={}, table={}, control_host="", down=[])
    sent: list[Any] = []
    control, in_flight = RemoteControl(setup, sent.append), InFlight()

    async def request() -> None:
        route = await control.resolve(MODEL)
        in_flight.add(route.replica.key)

    async def messages() -> AsyncIterator[ToWorker]:
        yield Resolved(1, Route(replica=replica))
        yield Collect(7)

    going = asyncio.create_task(request())
    await asyncio.sleep(0)
    channel, gateway = Mock(send=sent.append), Mock(in_flight=in_flight, collect=Counters)
    await worker_process.listen(messages(), channel, control, gateway, asyncio.Event())
    await going
    (counted,) = (message for message in sent if isinstance(message, Counted))
    assert (counted.number, counted.in_flight) == (7, [(replica.key, 1)])


async def test_a_route_whose_client_has_left_is_given_back() -> None:
    """Before it arrives, or at that moment: the control counts it until it is told."""
    replica = made_replica(MODEL, "benjy", "http://127.0.0.1:1")
    setup = Setup(config="{}", models=[MODEL], aliases={}, table={}, control_host="", down=[])
    sent: list[Any] = []
    control = RemoteControl(setup, sent.append)
    for arrives_first in (False, True):
        going = asyncio.create_task(control.resolve(MODEL))
        await asyncio.sleep(0)
        asked = sent[-1].number
        if arrives_first:
            control.receive(Resolved(asked, Route(replica=replica)))
        going.cancel()
        await asyncio.wait([going])
        if not arrives_first:
            control.receive(Resolved(asked, Route(replica=replica)))
        assert sent[-1] == RouteUnused(replica)
    assert sent.count(RouteUnused(replica)) == 2


async def test_a_worker_learns_which_neurons_are_down() -> None:
    """A worker learns it at its start and with each change, and ends the silent streams of their engines."""
    setup = Setup(config="{}", models=[], aliases={}, table={}, control_host="", down=["beast"])
    control = RemoteControl(setup, [].append)
    assert set(control.down) == {"beast"}

    async def messages() -> AsyncIterator[ToWorker]:
        yield DownChanged(["benjy"])

    await worker_process.listen(messages(), Mock(), control, Mock(), asyncio.Event())
    assert set(control.down) == {"benjy"}


async def test_requests_of_all_workers_are_told(workers: Workers) -> None:
    """Whichever worker has them, live or ended: the look asks all."""
    assert {await workers.ask() for _ in range(20)} <= {(200, "true"), (200, "false")}
    told: dict[str, Any] = {"ended": []}
    async with aiohttp.ClientSession() as http:
        while len(told["ended"]) < 20:  # a worker that is busy for a second tells at the next look
            async with http.get(f"{workers.url}/fleet/requests?node=benjy") as answer:
                told = await answer.json()
    assert (len(told["ended"]), told["live"]) == (20, [])
    assert [each["choice"] for each in told["ended"]][-1] == "loaded"
    assert len({each["id"] for each in told["ended"]}) == 20
