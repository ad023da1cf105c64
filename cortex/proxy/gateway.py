"""What a worker does with requests: those that name a model go to an engine, all others to the control app."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from cortex.http.connection import ClientConnection, Handling
from cortex.http.request import Request
from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import InFlight, Key
from cortex.proxy.access_log import AccessLog
from cortex.proxy.balancing.affinity import Affinity
from cortex.proxy.balancing.speeds import Speeds
from cortex.proxy.callers import Callers
from cortex.proxy.control_request import ControlRequest
from cortex.proxy.keep_alive import Comments
from cortex.proxy.request_handler import UNKNOWN, RequestHandler
from cortex.proxy.usage_queue import UsageQueue
from cortex.upstream.pool import Address, EnginePool
from cortex.upstream.replica import Failure, Replica, Route, WaitNote
from shared.errors import ServiceError
from shared.tasks import TaskSet

INFERENCE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""POST routes whose body names a model; all take the same way."""
_INFERENCE = frozenset(path.encode() for path in INFERENCE_PATHS)

COLLECT_SECS = 1.0
# An id from outside is echoed in a header and written to logs: anything else than these is replaced.
_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Control(Protocol):
    """The one brain of a cortex, as a worker sees it: in the same process, or at the other end of a channel."""

    table: dict[str, tuple[Replica, ...]]

    @property
    def aliases(self) -> Mapping[str, str]: ...

    def knows(self, model_id: str) -> bool: ...

    async def resolve(self, model_id: str, failures: Sequence[Failure] = ()) -> Route: ...

    def note(self, model_id: str) -> WaitNote | None:
        """What a client that waits for the model may be told now; None when nothing is known."""


class Gateway:
    """Owns a worker's side of everything: its pool, its counts, its speeds, its access log.
    Implements `front.client.Gateway`."""

    def __init__(
        self,
        control: Control,
        *,
        control_address: Address,
        callers: Callers,
        access: AccessLog,
        max_body_bytes: int,
        affinity: Affinity,
        load_factor: float,
        comments: Comments,
    ) -> None:
        """Needs a running loop."""
        self.control = control
        self.pool = EnginePool()
        self.in_flight = InFlight()
        self.affinity = affinity
        self.load_factor = load_factor
        self.speeds = Speeds()
        self.tally = Counters()
        self.access = access
        self.callers = callers
        self.tasks = TaskSet()
        self.max_body_bytes = max_body_bytes
        self.comments = comments
        self.draining = False
        self._control_address = control_address
        self.usage = UsageQueue()
        self._ids = itertools.count()
        self._id_prefix = os.urandom(10).hex()

    def now(self) -> float:
        return time.monotonic()

    def request_id(self, given: bytes | None) -> str:
        """The caller's `x-request-id` when it is harmless, else a new one."""
        if given is not None and _SAFE_REQUEST_ID.fullmatch(given):
            return given.decode()
        return self._id_prefix + format(next(self._ids), "012x")

    def handle(self, client: ClientConnection, request: Request) -> Handling:
        if request.method == b"POST" and request.path in _INFERENCE:
            return RequestHandler(self, client, request)
        return ControlRequest(self, client, request, self._control_address)

    def rejected(self, request: Request | None, error: ServiceError) -> str:
        request_id = self.request_id(None if request is None else request.request_id)
        if request is not None and request.path in _INFERENCE:
            self.tally.error(UNKNOWN, UNKNOWN, error.code)
            self.tally.request(UNKNOWN, UNKNOWN, error.status, self.now() - request.received, None)
        if self.access.on:
            what = "-" if request is None else f"{request.method.decode()} {request.path.decode('latin-1')}"
            self.access.line(f"{what} {error.status} refused={error.message!r} id={request_id}", request_id)
        return request_id

    def collect(self) -> Counters:
        """The tally, with the usage that has waited."""
        for record in self.usage.taken():
            self.tally.tokens(record.model_id, record.node, record.usage.prompt, record.usage.completion)
        return self.tally

    def in_flight_here(self) -> Mapping[Key, int]:
        return self.in_flight.here

    def begun_here(self) -> Mapping[Key, int]:
        return self.in_flight.begun

    async def refresh(self) -> None:
        """Nothing to do: everything is live."""

    async def account_loop(self) -> None:
        """Empties the usage queue for ever, off the request path."""
        while True:
            await asyncio.sleep(COLLECT_SECS)
            self.collect()

    async def close(self) -> None:
        await self.tasks.close()
        self.pool.close()
        self.access.flush()
