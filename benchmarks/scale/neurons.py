"""`python -m benchmarks.scale.neurons`: one process that simulates many neurons, each at its own address.

Neuron i listens on 127.1.x.y, speaks protocol v1 plus `/events`, `since` and `instance_id`, and also acts as the
engine of its models. Device load, temperature and power change with every answer, as on real devices. A control
endpoint on 127.0.0.1 takes changes: `POST /die`, `/revive` {"node": i} and
`/status` {"node": i, "model": id, "status": text}, which returns when the change was sent, as `time.perf_counter` in
seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, cast
from urllib.parse import unquote

from benchmarks.loops import run

KEEPALIVE_SECS = 15.0
MODELS_EACH = 4
MODELS = 200
"""Distinct models in the whole fleet: a larger fleet has more replicas of each."""
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Respond = Callable[["Exchange", str, str, bytes], bytes | None]


def address(index: int) -> str:
    """The address neuron `index` listens on: all of 127.0.0.0/8 is this host."""
    return f"127.1.{index // 250}.{index % 250 + 1}"


def model_name(number: int, models: int = MODELS) -> str:
    return f"bench/model-{number % models:03d}"


class Exchange(asyncio.Protocol):
    """One connection: requests in, answers out, one after another."""

    def __init__(self, respond: Respond, connections: set[Exchange]) -> None:
        self._respond = respond
        self._connections = connections
        self._buffer = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transport does not inherit from it
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].decode("latin-1").split("\r\n")
            lengths = [line[15:] for line in head if line[:15].lower() == "content-length:"]
            whole = end + 4 + (int(lengths[0]) if lengths else 0)
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            method, path, _ = head[0].split(" ", 2)
            answer = self._respond(self, method, path, body)
            if answer is not None and self.transport is not None:
                self.transport.write(answer)

    def write_event(self, name: str, data: Any) -> None:
        """Sends an event on an open stream."""
        event = f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
        if self.transport is not None:
            self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))


def json_answer(data: Any, status: str = "200 OK") -> bytes:
    body = json.dumps(data).encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def completion(model: str) -> dict[str, Any]:
    """A short chat answer."""
    message = {"role": "assistant", "content": "Yes."}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": model, "choices": choices, "usage": usage}


class PretendedNeuron:
    """The state of one neuron."""

    def __init__(self, index: int, port: int, *, protocol_v1: bool, devices: int = 2, models: int = MODELS) -> None:
        """`protocol_v1`: speaks only protocol v1. `models`: distinct ones in the whole fleet."""
        self.index = index
        self._protocol_v1 = protocol_v1
        self._devices = devices
        self._port = port
        self._started = time.time()
        self._answers = 0
        self._server: asyncio.Server | None = None
        self._connections: set[Exchange] = set()
        self._listeners: set[Exchange] = set()
        numbers = range(index * MODELS_EACH, (index + 1) * MODELS_EACH)
        self._models = {name: self._view(name) for name in (model_name(number, models) for number in numbers)}
        uuids = [f"GPU-{index:08x}-0000-0000-0000-{device:012x}" for device in range(devices)]
        self._pages: dict[str, Callable[[], Any]] = {
            "/discovery": lambda: self.discovery,
            "/health": self.health,
            "/models": self._listed,
        }
        self.discovery = (
            {
                "hostname": f"host{index}", "os": "Debian GNU/Linux 12", "kernel": "6.1.0-18-amd64",
                "cuda_version": "12.8", "driver_version": "570.86.15", "harnesses": ["vllm"],
                "devices": [
                    {"index": device, "name": "NVIDIA GeForce RTX 5090", "vram_total_mb": 32607, "uuid": uuid,
                     "compute_capability": "12.0", "pci_bus_id": f"0000:0{device + 1}:00.0", "numa_node": 0}
                    for device, uuid in enumerate(uuids)
                ],
                "links": [{"a": a, "b": b, "kind": "phb", "nvlinks": 0} for a, b in combinations(range(devices), 2)],
                "simulated": False, **({} if protocol_v1 else {"instance_id": f"instance-{index}", "version": "0.1.0"}),
            }
        )  # fmt: skip

    def _view(self, model_id: str) -> dict[str, Any]:
        return {
            "id": model_id, "harness": "vllm", "status": "loaded", "devices": [0], "vram_used_mb": 6000,
            "since": self._started, "progress": None, "error": None,
        }  # fmt: skip

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Exchange(self._respond, self._connections), address(self.index), self._port, backlog=128
        )

    def die(self) -> None:
        """Like a power loss, except that connections are reset at once."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            if connection.transport is not None:
                connection.transport.abort()
        self._listeners.clear()

    def change(self, model_id: str, status: str) -> float:
        """Sets a model's status and notifies every listener. Returns when."""
        self._models[model_id] = {**self._view(model_id), "status": status, "since": time.time()}
        told = time.perf_counter()
        for listener in self._listeners:
            listener.write_event("model", self._models[model_id])
        return told

    def keep_alive(self) -> None:
        for listener in self._listeners:
            if listener.transport is not None:
                listener.transport.write(b"3\r\n:\n\n\r\n")

    def _respond(self, exchange: Exchange, method: str, path: str, body: bytes) -> bytes | None:
        if path == "/events" and not self._protocol_v1:
            self._begin_events(exchange)
            return None
        if path in self._pages:
            return json_answer(self._pages[path]())
        if path == "/v1/chat/completions":
            return json_answer(completion(json.loads(body)["model"]))
        if path.endswith("/endpoint") and unquote(path[len("/models/") : -len("/endpoint")]) in self._models:
            return json_answer({"url": f"http://{address(self.index)}:{self._port}"})
        return json_answer({"error": f"{method} {path}: not found"}, "404 Not Found")

    def _begin_events(self, exchange: Exchange) -> None:
        self._listeners.add(exchange)
        if exchange.transport is not None:
            exchange.transport.write(_STREAM_HEAD)
        exchange.write_event("snapshot", self._listed())

    def _listed(self) -> list[dict[str, Any]]:
        beyond = {"since", "progress", "error"} if self._protocol_v1 else set()
        return [{key: value for key, value in view.items() if key not in beyond} for view in self._models.values()]

    def health(self) -> dict[str, Any]:
        self._answers += 1
        health = {
            "uptime_secs": round(time.time() - self._started, 3),
            "devices": [
                {
                    "index": device, "vram_used_mb": 24000, "vram_free_mb": 8607,
                    "utilization_pct": float(figure % 101), "temp_c": 40 + figure % 41, "power_w": 80 + figure / 7,
                }
                for device in range(self._devices)
                for figure in [self._answers * (37 + 16 * device) % 3301]
            ],
        }  # fmt: skip
        if self._protocol_v1:
            return health
        return {
            **health,
            "instance_id": f"instance-{self.index}",
            "models": [{"id": model_id, "in_flight": 0, "queue_depth": 0} for model_id in self._models],
        }


async def serve(count: int, port: int, *, protocol_v1: bool, models: int) -> None:
    """Runs until SIGTERM."""
    loop = asyncio.get_running_loop()
    make = partial(PretendedNeuron, port=port, protocol_v1=protocol_v1, models=models)
    neurons = [make(index) for index in range(count)]
    for neuron in neurons:
        await neuron.listen()

    def control(_exchange: Exchange, _method: str, path: str, body: bytes) -> bytes:
        asked = json.loads(body or b"{}")
        if path == "/die":
            neurons[asked["node"]].die()
        elif path == "/revive":
            revived = make(asked["node"])
            neurons[asked["node"]] = revived
            tasks.add(loop.create_task(revived.listen()))
        elif path == "/status":
            return json_answer({"told": neurons[asked["node"]].change(asked["model"], asked["status"])})
        return json_answer({"neurons": count})

    tasks: set[asyncio.Task[None]] = set()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    connections: set[Exchange] = set()
    server = await loop.create_server(lambda: Exchange(control, connections), "127.0.0.1", port)
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), KEEPALIVE_SECS)
        except asyncio.TimeoutError:
            for neuron in neurons:
                neuron.keep_alive()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scale.neurons", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--port", type=int, required=True, help="the same on every address")
    parser.add_argument("--protocol-v1", action="store_true", help="speak protocol v1 and nothing more")
    parser.add_argument("--models", type=int, default=MODELS, metavar="N", help="distinct models in the whole fleet")
    given = parser.parse_args()
    run(serve(given.count, given.port, protocol_v1=given.protocol_v1, models=given.models))


if __name__ == "__main__":
    main()
