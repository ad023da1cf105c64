"""An inference request from its `model` to its answer: finds an engine, sends, and retries where that is safe."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from cortex.accounts.caller import Caller
from cortex.http.connection import ClientConnection
from cortex.http.errors import shutting_down
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer, DirectAnswer
from cortex.proxy.answers.deferred_answer import DeferredAnswer, DeferredJson
from cortex.proxy.answers.keep_alive import ALWAYS_JSON, STREAMED, KeepAliveStream
from cortex.proxy.body.alias_edit import with_model_id
from cortex.proxy.body.request_fields import JsonModel, RequestFields
from cortex.proxy.context import ProxyContext
from cortex.proxy.paths import INFERENCE, no_route
from cortex.proxy.progress.account import CLIENT_DISCONNECTED, RequestAccount
from cortex.proxy.progress.state import Resolving, Sent
from cortex.proxy.progress.usage_request import UsageRequest, usage_request
from cortex.proxy.relay import Relay
from cortex.routing.replica import (
    Failure,
    FailureKind,
    Refusal,
    Replica,
    ServedPaths,
    failure_of,
    not_served,
    unreachable,
    untried,
)
from cortex.upstream.address import Address, engine_target
from shared.errors import ServiceError, internal_error
from shared.request_ids import request_scope

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
"""Most engines that one request is sent to: a request that kills its engine must not kill the fleet."""
STOPPING: Final = "cortex is stopping"


class RequestHandler:
    """Implements `http.connection.Handler` and `relay.RelayListener`.

    The state is a Resolving or a Sent; None before `begin`, in between and at the end. If the model can be served at
    once, the request goes straight to Sent, without a task and without an await.
    """

    __slots__ = (
        "_account",
        "_client",
        "_context",
        "_diverted",
        "_failures",
        "_keep_alive",
        "_name",
        "_request",
        "_state",
        "_usage_request",
    )

    def __init__(self, context: ProxyContext, client: ClientConnection, request: Request, caller: Caller) -> None:
        self._context = context
        self._client = client
        self._request = request
        self._account = RequestAccount(context, request, caller)
        self._state: Resolving | Sent | None = None
        self._name = ""
        self._diverted = False
        self._failures: list[Failure] = []
        self._keep_alive: KeepAliveStream | None = None
        self._usage_request: UsageRequest | None = None

    def begin(self) -> None:
        context, content_type = self._context, self._request.content_type.decode("latin-1")
        try:
            self._request.body, self._account.asked, name, model_id, field = with_model_id(
                self._request.body, content_type, context.control.aliases, context.default_model
            )
        except ServiceError as error:
            self._refuse_unnamed(error)
            return
        fields = field if isinstance(field, JsonModel) else None
        if fields is not None:
            self._usage_request = usage_request(self._request, fields)
        self._admit(name, model_id, fields)

    def _refuse_unnamed(self, error: ServiceError) -> None:
        """The body gives no model that can be used. On an unknown path the path is probably wrong."""
        self._refuse(error if self._request.path in INFERENCE else no_route(self._request))

    def _admit(self, name: str, model_id: str, fields: RequestFields | None = None) -> None:
        """Sends it to an engine of the model `name`, an id or `id@variant`, if the limits allow it. `fields`: of its
        body, if that is complete and JSON."""
        self._name, self._account.model_id = name, model_id
        try:
            admitted = self._account.admit(fields)
        except ServiceError as error:
            self._refuse(error)
            return
        if not admitted:
            self._state = Resolving(self._spawn(self._wait_for_admission(), "admission of"))
            return
        self._route(name, model_id)

    async def _wait_for_admission(self) -> None:
        await self._account.admission()
        self._resolved()
        self._route(self._name, self._account.model_id)

    def _route(self, name: str, model_id: str) -> None:
        """Sends it to an engine, or asks the control for one."""
        self._send_to_one_of(self._context.control.table.get(name, ()))

    def abandon(self) -> None:
        state = self._leave_state()
        relay = state.relay if isinstance(state, Sent) else None
        self._stop_keep_alive()
        if relay is not None:
            relay.abandon()
        status = CLIENT_DISCONNECTED if relay is None or not relay.status else relay.status
        self._account.close(status, relay, left=True)

    def stop(self) -> None:
        state = self._state
        if isinstance(state, Sent):
            if state.ending is not None:
                state.end_lost(self._account.request_id)
                return
            if state.relay.status:
                state.relay.cut_off(STOPPING)
                return
            state.relay.abandon()
        self._leave_state()
        self._refuse(shutting_down())

    def pause(self) -> None:
        state = self._state
        if isinstance(state, Sent):
            state.relay.pause()

    def resume(self) -> None:
        state = self._state
        if isinstance(state, Sent):
            state.relay.resume()

    def tick(self, now: float) -> None:
        state = self._state
        if isinstance(state, Sent):
            state.relay.tick(now, neuron_down=state.replica.node in self._context.control.down)
            if self._state is state:
                self._break_silence(state, now)

    def _break_silence(self, sent: Sent, now: float) -> None:
        """Tells a client that has heard nothing for a while that its request is still worked on."""
        relay = sent.relay
        if not sent.is_silent(now, self._context.keep_alive.silence_secs):
            return
        if relay.status:
            relay.answer.break_silence(f"{self._name} on {self._account.node} is working")
        elif self._keep_alive is None and not sent.plain:
            keep_alive = self._new_keep_alive(cold=False)
            sent.plain = not keep_alive.begin_at(self._account.node)
            if keep_alive.begun:
                self._keep_alive = keep_alive
                relay.answer = self._deferred(keep_alive)

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        self._fail(reason, kind)
        if self._account.attempts >= MAX_ATTEMPTS or not self._request.replayable:
            self._refuse(unreachable(self._name, self._failures))
            return
        # The control must learn of a dead engine before other requests go there. A busy engine is only avoided.
        self._send_to_one_of(self._untried() if kind == "timeout" else ())

    def refused(self, status: int, refusal: Refusal) -> bool:
        state = self._state
        assert isinstance(state, Sent)
        if self._account.attempts >= MAX_ATTEMPTS or not self._request.replayable:
            return False
        others = self._untried() if refusal == "unavailable" else ()
        kind = failure_of(refusal, state.replica, self._failures, others)
        if kind is None or (state.relay.only_head and not self._can_follow(state.relay.answer)):
            return False
        self._fail(f"it answered {status}{f', {refusal}' if refusal in ('asleep', 'dead') else ''}", kind)
        self._send_to_one_of(others)
        return True

    def lost(self, reason: str) -> None:
        state = self._state
        assert isinstance(state, Sent)
        if reason == STOPPING:
            state.end_stopped()
        elif state.relay.answer.events:
            state.ending = self._spawn(state.end_explained(self._account.request_id, self._context.control), "end")
        else:
            state.end_lost(self._account.request_id)

    def _can_follow(self, answer: Answer) -> bool:
        """Prepares to continue an event stream whose head the client already has. False if that is impossible."""
        if not answer.can_follow:
            return False
        self._keep_alive = self._keep_alive or self._new_keep_alive(cold=True)
        self._keep_alive.follow()
        return True

    def done(self) -> None:
        state = self._leave_state()
        assert isinstance(state, Sent)
        relay = state.relay
        if self._usage_request is not None:
            self._usage_request.answered(relay.status)
        self._account.close(relay.status, relay)
        if state.compared and self._account.attempts == 1 and not self._account.cold:  # others are not comparable
            self._context.measure(state.replica, self._request, relay)
        self._stop_keep_alive()
        self._client.finished()

    def _untried(self) -> tuple[Replica, ...]:
        """Usable replicas that this request has not been sent to."""
        replicas = self._context.control.table.get(self._name, ())
        return untried(replicas, self._failures, self._state.replica if isinstance(self._state, Sent) else None)

    def _fail(self, reason: str, kind: FailureKind) -> None:
        """Gives up the current replica."""
        state = self._leave_state()
        assert isinstance(state, Sent)
        self._context.stream_usages.forget(state.replica)  # it may come back changed
        self._failures.append(state.failed(self._account.request_id, reason, kind))
        self._account.failed(state.replica, reason, kind)

    def _send_to_one_of(self, replicas: tuple[Replica, ...]) -> None:
        """Without a replica, or if it has as many requests as its neuron allows, asks the control."""
        if replicas:
            replica, self._account.choice = replicas[0], "only"
            if len(replicas) > 1:
                replica, self._account.choice = self._context.choose(self._request, replicas)
            if replica.limit is None or self._context.control.take(replica):
                self._send(replica, compared=len(replicas) > 1)
                return
        self._resolve()

    def _resolve(self) -> None:
        context, request = self._context, self._request
        if self._keep_alive is None and request.path in (ALWAYS_JSON if context.keep_alive.whitespace else STREAMED):
            self._keep_alive = self._new_keep_alive(cold=self._name not in context.control.table)
            self._keep_alive.begin_later()
        self._state = Resolving(self._spawn(self._ask_control(), "resolve"))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        self._account.waits(name, self._name)
        with request_scope(self._account.request_id):
            return self._context.tasks.spawn(self._run(work), name=f"{name} {self._account.request_id}")

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a task of this request. Its client gets an answer whatever fails."""
        try:
            await work
        except ServiceError as error:
            self._give_up(error)
        except Exception:
            log.exception("cortex cannot handle the request")
            self._give_up(internal_error())

    def _give_up(self, error: ServiceError) -> None:
        state = self._state
        if isinstance(state, Resolving):
            self._resolved()
        elif state is not None:
            if state.give_up(self._account.request_id):
                return
            self._leave_state()
        if not self._account.closed:
            self._refuse(error)

    async def _ask_control(self) -> None:
        caller, able = self._account.caller, self._is_able
        route = await self._context.resolve(self._request, self._name, self._failures, caller, able)
        self._resolved()
        self._account.found(route)
        if route.cold:
            self._context.stream_usages.forget(route.replica)
            self._failures = [f for f in self._failures if f.replica.key != route.replica.key or f.kind == "dead"]
        self._send(route.replica, compared=False)

    def _resolved(self) -> None:
        state, self._state = self._state, None
        assert isinstance(state, Resolving)
        self._account.has_waited(state.since)
        if self._keep_alive is not None and not self._keep_alive.begun:
            self._stop_keep_alive()

    def _new_keep_alive(self, *, cold: bool) -> KeepAliveStream:
        client, request_id = self._client, self._account.request_id
        return self._context.keep_alive_stream(client, self._request, request_id, self._name, cold=cold)

    def _stop_keep_alive(self) -> None:
        if self._keep_alive is not None:
            self._keep_alive.stop()
            self._keep_alive = None

    def _send(self, replica: Replica, *, compared: bool) -> None:
        context, request = self._context, self._request
        if replica.served is not None and not self._is_able(replica.served):
            error = not_served(self._name, request.path, replica.served)
            self._divert(replica, error, lambda each: each.served is None or self._is_able(each.served))
            return
        self._account.sent_to(replica)
        context.count(replica, self._account.key_id)
        if self._usage_request is not None:
            self._usage_request.prepare(context.stream_usages.of(replica))
        if self._keep_alive is None:
            answer = self._new_answer(self._account.head_lines())
        else:
            self._keep_alive.sent_to = replica.node
            answer = self._deferred(self._keep_alive)
        request_id = self._account.request_id.encode()
        address, host, prefix, credentials = engine_target(replica.url, replica.api_key, replica.keep_alive_secs)
        relay = self._new_relay(replica, address, request.head_for(host, prefix, request_id, credentials), answer)
        if self._usage_request is not None:
            relay.on_refusal = self._send_unasked
        self._state = Sent(replica, relay, compared=compared)
        self._account.relay = relay
        relay.start()

    def _send_unasked(self) -> bool:
        """Sends a refused request again, to the same engine, as the client sent it. Implements `Relay.on_refusal`."""
        state = self._state
        assert isinstance(state, Sent)
        assert self._usage_request is not None
        if not self._usage_request.give_up():
            return False
        self._state = None
        self._context.uncount(state.replica, self._account.key_id)  # its place at a replica with a limit is kept
        self._account.attempts -= 1
        self._send(state.replica, compared=state.compared)
        return True

    def _is_able(self, served: ServedPaths) -> bool:
        """Whether engines that serve these paths can answer the request."""
        return served.has(self._request.path)

    def _divert(self, replica: Replica, error: ServiceError, is_able: Callable[[Replica], bool]) -> None:
        """This replica cannot answer the request: sends it to one that is able to, else refuses it."""
        # The control counts it already, and must learn that it has ended.
        self._context.count(replica, self._account.key_id)
        self._context.finished(replica, self._account.key_id)
        able = tuple(filter(is_able, self._context.control.table.get(self._name, ())))
        others = untried(able, self._failures, replica)
        if others and not self._diverted:  # once: with limits, the control may name this replica again and again
            self._diverted = True
            self._send_to_one_of(others)
        else:
            self._account.label, self._account.node = self._account.model_id, replica.node
            self._refuse(error)

    def _new_relay(self, replica: Replica, address: Address, head: bytes, answer: Answer) -> Relay:
        """A relay that sends the request, with this `head`, to the engine at `address`."""
        return Relay(self._context.pool, self._request, self, address=address, head=head, answer=answer)

    def _new_answer(self, extra: bytes) -> Answer:
        """The form of the answer. `extra`: header lines, without the final CRLF."""
        return self._without_usage(DirectAnswer(self._client, self._request, extra=extra))

    def _without_usage(self, answer: Answer) -> Answer:
        return answer if self._usage_request is None else self._usage_request.form(answer)

    def _deferred(self, keep_alive: KeepAliveStream) -> Answer:
        """The rest of an answer that has begun."""
        form = DeferredAnswer if keep_alive.events else DeferredJson
        return self._without_usage(form(self._client, self._request, keep_alive=keep_alive))

    def _leave_state(self) -> Resolving | Sent | None:
        """Leaves the current state and returns it."""
        state, self._state = self._state, None
        if isinstance(state, Sent):
            self._context.finished(state.replica, self._account.key_id)
            if self._keep_alive is not None:
                self._keep_alive.sent_to = None
            if state.ending is not None:
                state.ending.cancel()
        elif state is not None:
            state.task.cancel()
            self._account.has_waited(state.since)
        return state

    def _refuse(self, error: ServiceError) -> None:
        self._account.close(error.status, None, error=error)
        keep_alive = self._keep_alive
        self._stop_keep_alive()
        if keep_alive is not None and keep_alive.begun:
            keep_alive.fail(error)
            self._client.finished()
        else:
            self._client.refuse(error, self._account.request_id, self._account.node if self._failures else None)
