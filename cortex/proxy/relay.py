"""One request to one engine: connects, sends, passes the answer on, and reports the loss of either side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final, Protocol

from cortex.http.framing import SizedBody
from cortex.http.heads import ResponseHead
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.answers.held_answer import MAX_HELD_BYTES, HeldAnswer
from cortex.proxy.refusal import TOLD_BY_BODY, refusal_of, starts_dead
from cortex.routing.replica import FailureKind, Refusal
from cortex.upstream.address import Address
from cortex.upstream.connection import Body, EngineConnection
from cortex.upstream.pool import EnginePool, NoConnection
from shared.errors import ServiceError

REFUSALS: Final = frozenset({400, 422})
"""Statuses of an engine that does not accept the request itself."""
_BRACE: Final = 0x7B
DOWN_SILENCE_SECS = 30.0
"""How long an engine may be silent while its neuron counts as down. A neuron that restarts takes less."""


class RelayListener(Protocol):
    """Exactly one of `unreachable`, `refused` (True) and `done` ends a relay, unless it is abandoned."""

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        """The engine did not answer. Nothing was sent to the client; the request can go elsewhere."""

    def refused(self, status: int, refusal: Refusal) -> bool:
        """The engine answered with an error that says that another engine may answer. Nothing was sent to the client,
        except perhaps the head of an event stream (`Relay.only_head`). Returns True if the request goes elsewhere,
        False if the client gets this answer."""

    def lost(self, reason: str) -> None:
        """The engine was lost while it answered. The listener has to call `Relay.end_lost`, now or later."""

    def done(self) -> None:
        """The client has its answer, or the beginning of it (`lost_because`)."""


class Relay:
    """Implements `upstream.connection.Exchange`. `status` is 0 until the head of the answer has arrived.
    `only_head`: the client has the head of an event stream and nothing else; the request can still go elsewhere.
    `silent_since` is the time of the first tick after the engine's last byte. Times are monotonic seconds."""

    __slots__ = (
        "_abandoned",
        "_address",
        "_connecting",
        "_connection",
        "_down_since",
        "_head",
        "_last_piece",
        "_listener",
        "_pool",
        "_request",
        "_straight",
        "answer",
        "first_byte_at",
        "first_event_at",
        "lost_because",
        "on_refusal",
        "on_start",
        "only_head",
        "silent_since",
        "status",
    )

    def __init__(
        self,
        pool: EnginePool,
        request: Request,
        listener: RelayListener,
        *,
        address: Address,
        head: bytes,
        answer: Answer,
    ) -> None:
        """`head` is the request's head for the engine."""
        self._pool = pool
        self._request = request
        self._listener = listener
        self._address = address
        self._head = head
        self.answer = answer
        self._connection: EngineConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._abandoned = False
        self._straight = False  # the engine's chunks can pass to the client as they are
        self.status = 0
        self.only_head = False
        self.first_byte_at: float | None = None
        self.first_event_at = 0.0  # of an event stream: its first bytes after the head
        self.lost_because: str | None = None
        self.on_start: Callable[[bytes], bool] | None = None  # gets the body so far, until it returns True
        # Called if the engine does not accept the request itself. True if it is sent again, which ends the relay.
        self.on_refusal: Callable[[], bool] | None = None
        self._down_since = 0.0  # 0 while the neuron is up
        self._last_piece: bytes | None = None
        self.silent_since = 0.0

    def start(self) -> None:
        # A kept connection may break and require a retry, for which the beginning of a streamed body is gone.
        connection = None if self._request.streamed is not None else self._pool.take(self._address)
        if connection is None:
            self._connect()
        else:
            self._send(connection)

    def abandon(self) -> None:
        """The client disconnected."""
        self._abandoned = True
        self._close_body()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abandon()
            self._connection = None

    def cut_off(self, reason: str) -> None:
        """Ends an answer that has begun, as if its engine were lost."""
        if self._connection is not None:
            self._connection.lose(reason)

    def pause(self) -> None:
        """The client reads too slowly."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def tick(self, now: float, *, neuron_down: bool) -> None:
        """Updates `silent_since`, and ends the relay if the engine is silent while its neuron counts as down. Chunks
        are not counted as they pass, because that would cost each of them time."""
        connection, chunks = self._connection, self.answer.tail.chunks
        last_piece = chunks[-1] if chunks else None
        if last_piece is not self._last_piece or not self.silent_since or connection is None or connection.paused:
            self._last_piece = last_piece
            self.silent_since = now
        if not neuron_down:
            self._down_since = 0.0
        elif not self._down_since:
            self._down_since = now
        elif now - max(self._down_since, self.silent_since) >= DOWN_SILENCE_SECS:
            self.cut_off("its neuron is down and it has been silent since")

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        if head.status >= 400 and (self._must_hold(head, body, first) or self._goes_elsewhere(head, first)):
            return
        # A body that begins with a brace has no events: there is no need to search the usual plain answer.
        if first and first[0] != _BRACE and starts_dead(first) and self._refused("dead", head.status):
            return
        self._begin(head, body, first)

    def _begin(self, head: ResponseHead, body: Body, first: bytes) -> None:
        """The client gets this answer."""
        self.first_byte_at = monotonic()
        self.status = head.status
        self._head = b""
        answer = self.answer
        self._straight = answer.begin(head, body, first) and not body.ended
        if answer.events:
            if not first:
                self.only_head = True
                return
            self.first_event_at = self.first_byte_at
        self._request.forget()
        if head.status == 101:
            self._open_tunnel()
        if self.on_start is not None:
            self._show_start()
        elif self._straight:
            self._pass_straight()

    def _open_tunnel(self) -> None:
        """From now on the client's bytes go to the engine as they are."""
        connection, client = self._connection, self.answer.client
        assert connection is not None
        connection.on_full = client.hold_back
        client.begin_tunnel(connection.transport.write)

    def passed(self, data: bytes) -> None:
        if self.only_head:
            self._pass_first(data)
            return
        self.answer.write(data)
        if self._straight and self._connection is not None:
            self._connection.straight_end = self.answer.straight_end
        if self.on_start is not None:
            self._show_start()

    def _pass_first(self, data: bytes) -> None:
        """The first bytes of an event stream that came after its head."""
        if starts_dead(data) and self._refused("dead", self.status):
            return
        self.only_head = False
        self.first_event_at = monotonic()
        self._request.forget()
        self.answer.write(data)
        if self.on_start is not None:
            self._show_start()
        elif self._straight:
            self._pass_straight()

    def _pass_straight(self) -> None:
        assert self._connection is not None
        answer = self.answer
        self._connection.pass_straight(answer.client.transport.write, answer.tail, answer.straight_end)

    def _show_start(self) -> None:
        assert self.on_start is not None
        if self.on_start(self.answer.contents_start):
            self.on_start = None
            if self._straight:
                self._pass_straight()

    def ended(self) -> None:
        self._connection = None
        self._close_body()
        held = self.answer
        if isinstance(held, HeldAnswer):
            if self._goes_elsewhere(held.head, held.contents()):
                return
            self._release()
        self.status = self.answer.finish(self.status)
        self._listener.done()

    def lost(self, reason: str, *, stale: bool) -> None:
        if isinstance(self.answer, HeldAnswer):
            self._release()
        self._connection = None
        self._close_body()
        if stale:
            # The engine closed an idle connection at the moment it was used: retry on a new one.
            self._connect()
        elif not self.status:
            self._listener.unreachable(reason, "reset")
        else:
            self.lost_because = reason
            self._listener.lost(reason)

    def end_lost(self, error: ServiceError, model: str = "") -> None:
        """Ends the answer of an engine that was lost; arguments as of `Answer.lose`."""
        self.answer.lose(error, model)
        self._listener.done()

    def _connect(self) -> None:
        self._connecting = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        try:
            await self._pool.connect(self._address, self._send)
        except NoConnection as error:
            self._connecting = None
            self._listener.unreachable(error.reason, error.kind)

    def _send(self, connection: EngineConnection) -> None:
        self._connecting = None
        if self._abandoned:
            connection.abandon()
            return
        self._connection = connection
        request = self._request
        streamed = request.streamed
        if streamed is None:
            if request.upgrading:
                connection.expect_upgrade()
            connection.send(self, self._head, request.body)
            return
        connection.partial = True
        connection.send(self, self._head, streamed.framed(request.body))
        connection.on_full = streamed.hold_back
        streamed.open(self._pass_on)

    def _pass_on(self, data: bytes) -> None:
        """Sends more of a streamed body."""
        connection, streamed = self._connection, self._request.streamed
        if connection is not None and streamed is not None:
            connection.partial = not streamed.ended
            connection.transport.write(data)

    def _close_body(self) -> None:
        if self._request.streamed is not None:
            self._request.streamed.close()

    def _must_hold(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        """Holds an error back if the rest of its body is needed to know what it means."""
        if (
            head.status in TOLD_BY_BODY
            and isinstance(body, SizedBody)
            and not body.ended
            and len(first) + body.left <= MAX_HELD_BYTES
        ):
            self._hold(head, body, first)
            return True
        return False

    def _hold(self, head: ResponseHead, body: Body, first: bytes) -> None:
        """Nothing of this answer goes to the client until it is complete."""
        self.status = head.status
        self.answer = HeldAnswer(self.answer, head, body, self._release)
        self.answer.write(first)

    def _release(self) -> None:
        """The client gets what was held back, and the rest."""
        held = self.answer
        assert isinstance(held, HeldAnswer)
        self.answer = held.inner
        self._begin(held.head, held.framing, b"".join(held.pieces))

    def _goes_elsewhere(self, head: ResponseHead, body: bytes) -> bool:
        """True if the listener retries elsewhere: the answer only says that this engine does not serve now, or that it
        may not be the model's engine. `body`: what there is of it."""
        refusal = refusal_of(head, body)
        if refusal is not None:
            return self._refused(refusal, head.status)
        if self.on_refusal is None or head.status not in REFUSALS or not self.on_refusal():
            return False
        self._drop()
        return True

    def _refused(self, refusal: Refusal, status: int) -> bool:
        """True if the listener retries elsewhere, which ends the relay."""
        if not self._listener.refused(status, refusal):
            return False
        self._drop()
        return True

    def _drop(self) -> None:
        """Drops an answer that the client does not get."""
        connection, self._connection = self._connection, None
        self._close_body()
        if connection is not None:  # the answer is not complete
            connection.drop()
