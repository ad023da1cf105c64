"""A client's request from its `model` to its answer: find an engine, send, and try again where that is safe."""

from __future__ import annotations

import asyncio
import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.http.stopping import stopping
from cortex.proxy.balancing.choice import choose
from cortex.proxy.deferred_relay import DeferredRelay
from cortex.proxy.error_event import error_event
from cortex.proxy.keep_alive import STREAMED, WaitingStream
from cortex.proxy.model_field import find_model
from cortex.proxy.relay import Relay
from cortex.proxy.usage_queue import UsageRecord
from cortex.upstream.pool import Address, parse_url
from cortex.upstream.replica import Failure, FailureKind, Replica, WaitNote, unreachable
from shared.errors import ServiceError
from shared.request_ids import request_scope

if TYPE_CHECKING:
    from cortex.proxy.gateway import Gateway

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
"""Engines that one request may be sent to: a request that kills its engine must not kill the fleet."""

UNKNOWN: Final = "unknown"
"""The metrics' label for a model or a neuron that does not exist."""

LEFT: Final = 499
"""nginx's number for a client that left before its answer."""


class RequestHandler:
    """Implements `front.client.Handling` and `relay.Listener`. Where the model can be served at once no task is made
    and nothing is awaited; whatever has to be waited for is asked of the control, in a task."""

    __slots__ = (
        "_asked_at",
        "_attempts",
        "_caller",
        "_client",
        "_cold",
        "_compared",
        "_failures",
        "_gateway",
        "_known",
        "_model_id",
        "_node",
        "_relay",
        "_replica",
        "_request",
        "_request_id",
        "_resolving",
        "_waited",
        "_waiting",
    )

    def __init__(self, gateway: Gateway, client: ClientConnection, request: Request) -> None:
        self._gateway = gateway
        self._client = client
        self._request = request
        self._request_id = gateway.request_id(request.request_id)
        self._caller = gateway.callers.identify(request.shown_key)
        self._model_id = UNKNOWN
        self._known = False
        self._node = UNKNOWN
        self._cold = False
        self._compared = False  # this replica with others
        self._attempts = 0
        self._failures: list[Failure] = []
        self._replica: Replica | None = None
        self._relay: Relay | None = None
        self._resolving: asyncio.Task[None] | None = None
        self._waiting: WaitingStream | None = None
        self._asked_at = 0.0
        self._waited = 0.0  # seconds, for the control's answers

    def begin(self) -> None:
        request, control = self._request, self._gateway.control
        try:
            field = find_model(request.body, request.content_type.decode("latin-1"))
        except ServiceError as error:
            self._refuse(error)
            return
        model_id = control.aliases.get(field.model, field.model)
        if model_id != field.model:
            request.body = field.replaced(request.body, model_id)
        self._model_id = model_id
        replicas = control.table.get(model_id)
        if replicas:
            self._send(replicas[0] if len(replicas) == 1 else self._least_busy(replicas))
        else:
            self._known = control.knows(model_id)
            self._resolve()

    def abandon(self) -> None:
        if self._resolving is not None:
            self._resolving.cancel()
            self._waited += self._gateway.now() - self._asked_at
        self._wait_no_longer()
        relay = self._relay
        if relay is not None:
            relay.abandon()
        self._leave()
        self._account(LEFT if relay is None or not relay.status else relay.status)
        self._relay = None

    def stop(self) -> None:
        relay = self._relay
        if relay is not None and relay.status:
            relay.cut_off("cortex is stopping")
            return
        if self._resolving is not None:
            self._resolving.cancel()
            self._resolving = None
        if relay is not None:
            relay.abandon()
        self._leave()
        self._relay = None
        self._refuse(stopping())

    def pause(self) -> None:
        if self._relay is not None:
            self._relay.pause()

    def resume(self) -> None:
        if self._relay is not None:
            self._relay.resume()

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        self._fail(reason, kind)
        if self._attempts >= MAX_ATTEMPTS:
            self._refuse(unreachable(self._model_id, self._failures))
            return
        # The control is told of an engine that is dead, before all others go there. One that is busy is only avoided.
        others = self._untried() if kind == "timeout" else ()
        if others:
            self._send(self._least_busy(others))
        else:
            self._resolve()

    def refused(self, status: int, *, asleep: bool) -> bool:
        replica = self._replica
        assert replica is not None
        if self._attempts >= MAX_ATTEMPTS:
            return False
        others = () if asleep else self._untried()
        again = any(f.replica.node == replica.node and f.kind == "status" for f in self._failures)
        if again and not others and not asleep:
            return False  # the control has been asked, and said that it is well: so this is its answer
        self._fail(f"it answered {status}{', asleep' if asleep else ''}", "status")
        if others:
            self._send(self._least_busy(others))
        else:
            self._resolve()
        return True

    def done(self) -> None:
        relay = self._relay
        assert relay is not None
        self._leave()
        self._account(relay.status)
        if self._compared:
            self._measure(relay)
        self._wait_no_longer()
        self._relay = None  # the two know each other: without this only the garbage collector would find them
        self._client.finished()

    def _least_busy(self, replicas: tuple[Replica, ...]) -> Replica:
        """The replica with the least to do, or the one that knows the prompt's beginning and has not much more."""
        gateway, request, model_id = self._gateway, self._request, self._model_id
        self._compared = True
        nodes: list[str] = []
        outstanding: list[int] = []
        for replica in replicas:
            nodes.append(replica.node)
            outstanding.append(gateway.in_flight.count((model_id, replica.node)) + replica.others)
        key = gateway.affinity.key(request.path, request.passed, request.body)
        return replicas[choose(nodes, outstanding, gateway.speeds.of(model_id, nodes), key, gateway.load_factor)]

    def _measure(self, relay: Relay) -> None:
        """Only what came at once, and whole, says how fast an engine is."""
        if relay.status == 200 and relay.lost_because is None and self._attempts == 1 and not self._cold:
            gateway, request = self._gateway, self._request
            kind = self._model_id, request.path, relay.events
            gateway.speeds.learn(kind, self._node, gateway.now() - request.received, relay.sent_bytes)

    def _untried(self) -> tuple[Replica, ...]:
        """Replicas that can be used without asking, and that this request was not sent to."""
        tried = {failure.replica.node for failure in self._failures}
        if self._replica is not None:
            tried.add(self._replica.node)
        return tuple(r for r in self._gateway.control.table.get(self._model_id, ()) if r.node not in tried)

    def _fail(self, reason: str, kind: FailureKind) -> None:
        """The present replica gave no answer for the client."""
        replica = self._replica
        assert replica is not None
        with request_scope(self._request_id):
            log.warning("%s on %s does not serve (%s): %s", replica.model_id, replica.node, kind, reason)
        self._leave()
        self._relay = None
        self._failures.append(Failure(replica=replica, reason=reason, kind=kind))

    def _resolve(self) -> None:
        gateway, request = self._gateway, self._request
        if self._waiting is None and request.path in STREAMED:
            self._waiting = WaitingStream(self._client, request, self._request_id, self._note, gateway.comments)
        self._asked_at = gateway.now()
        with request_scope(self._request_id):
            self._resolving = self._gateway.tasks.spawn(self._ask_control(), name=f"resolve {self._request_id}")

    async def _ask_control(self) -> None:
        try:
            route = await self._gateway.control.resolve(self._model_id, self._failures)
        except ServiceError as error:
            self._resolved()
            self._refuse(error)
            return
        self._resolved()
        if route.cold:
            self._cold = True
            self._failures = [f for f in self._failures if f.replica.node != route.replica.node]
        self._send(route.replica)

    def _resolved(self) -> None:
        self._resolving = None
        self._waited += self._gateway.now() - self._asked_at
        if self._waiting is not None and not self._waiting.begun:
            self._wait_no_longer()

    def _wait_no_longer(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None  # the two know each other

    def _note(self) -> WaitNote:
        """What the client is told while it waits."""
        if self._replica is not None:
            return WaitNote(text=f"{self._model_id} on {self._node} has the request", node=self._node)
        return self._gateway.control.note(self._model_id) or WaitNote(text=f"waiting for {self._model_id}")

    def _send(self, replica: Replica) -> None:
        gateway, request = self._gateway, self._request
        self._known = True
        self._replica = replica
        self._node = replica.node
        self._attempts += 1
        gateway.in_flight.add((replica.model_id, replica.node))
        address, host, prefix, credentials = _target(replica.url, replica.api_key)
        request_id = self._request_id.encode()
        head = request.head_for(host, prefix, request_id, credentials)
        relay: Relay
        if self._waiting is None:
            relay = Relay(
                gateway.pool,
                self._client,
                request,
                self,
                address=address,
                head=head,
                extra=b"x-request-id: %b\r\nx-cortex-node: %b\r\nx-cortex-cold-start: %b"
                % (request_id, replica.node.encode(), b"true" if self._cold else b"false"),
            )
        else:
            relay = DeferredRelay(
                gateway.pool, self._client, request, self, address=address, head=head, waiting=self._waiting
            )
        self._relay = relay
        relay.start()

    def _leave(self) -> None:
        """The present replica has no part in this request any more."""
        replica, self._replica = self._replica, None
        if replica is not None:
            self._gateway.in_flight.remove((replica.model_id, replica.node))

    def _refuse(self, error: ServiceError) -> None:
        self._gateway.tally.error(self._label, self._node, error.code)
        self._account(error.status)
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.finish(error_event(self._request.path, error))
            self._client.finished()
        else:
            self._client.refuse(error, self._request_id, self._node if self._failures else None)

    @property
    def _label(self) -> str:
        """The model as a label: only ids that exist, so that clients cannot make up time series."""
        return self._model_id if self._known else UNKNOWN

    def _account(self, status: int) -> None:
        gateway, relay, request = self._gateway, self._relay, self._request
        model, node = self._label, self._node
        took = gateway.now() - request.received
        sent, more = 0, ""
        first_byte_secs: float | None = None
        if relay is not None:
            sent = relay.sent_bytes
            if relay.first_byte_at is not None:
                first_byte_secs = relay.first_byte_at - request.received
            if relay.lost_because is not None:
                more = f" lost={relay.lost_because!r}"
                gateway.tally.error(model, node, "upstream_lost")
            elif status != LEFT:
                self._note_usage(relay)
        gateway.tally.request(model, node, status, took, first_byte_secs)
        if gateway.access.on:
            if self._attempts > 1:
                more = f" attempts={self._attempts}{more}"
            if self._waited >= 0.001:
                more = f" waited={format(self._waited, '.3f')}{more}"
            secs = format(took, ".3f")
            gateway.access.line(
                f"POST {request.path.decode('latin-1')} {status} model={model} node={node}"
                f" cold={'yes' if self._cold else 'no'} bytes={sent} secs={secs} id={self._request_id}{more}",
                self._request_id,
            )

    def _note_usage(self, relay: Relay) -> None:
        usage = relay.usage()
        if usage is not None:
            self._gateway.usage.put(UsageRecord(self._caller, self._label, self._node, usage))


@lru_cache(maxsize=4096)
def _target(url: str, api_key: str | None) -> tuple[Address, bytes, bytes, tuple[bytes, ...]]:
    """(address, Host header, path prefix, credentials) of an engine."""
    address, prefix = parse_url(url)
    credentials = () if api_key is None else (b"authorization: Bearer " + api_key.encode(),)
    return address, address.authority, prefix, credentials
