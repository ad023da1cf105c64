"""What all requests of a worker share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from cortex.accounts.caller import Caller, may
from cortex.accounts.usage.journal import NoUsageLog, UsageLog
from cortex.config.profile import AUTO_TOOL_CHOICE, TOOLS_HINT
from cortex.config.settings import CortexConfig
from cortex.http.access_log import AccessLog
from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.metrics.in_flight import InFlight
from cortex.metrics.request_tally import RequestTally
from cortex.metrics.requests.ring import RequestRing
from cortex.proxy.answers.keep_alive import KeepAlivePolicy, KeepAliveStream
from cortex.proxy.paths import INFERENCE
from cortex.proxy.prompt.expected_tokens import ExpectedTokens
from cortex.proxy.prompt.local_tokenizer import local_tokenizer
from cortex.proxy.prompt.prompt_size import LONGEST_TOKEN_CHARS, SIZED, excess, prompt_size
from cortex.proxy.prompt.token_counter import TokenCounter
from cortex.proxy.relay import Relay
from cortex.routing.affinity import Affinity
from cortex.routing.choice import choose
from cortex.routing.control import ContextBound, Control
from cortex.routing.missing_paths import MissingPaths
from cortex.routing.replica import Failure, Replica, ReplicaKey, Route, ServedPaths, adapter_key, not_served
from cortex.routing.response_owners import SEARCHED_BYTES, ResponseMaker, response_id
from cortex.routing.speeds import Speeds
from cortex.routing.stream_usage import StreamUsages
from cortex.upstream.pool import EnginePool
from cortex.upstream.usage import Usage
from shared.protocol import ErrorCode
from shared.tasks import TaskSet

if TYPE_CHECKING:  # needs packages that may be missing
    from cortex.metrics.tracing.tracing import Tracing

log = logging.getLogger(__name__)

Choice: TypeAlias = Literal["only", "prefix", "least_busy", "control", "loaded", "maker", ""]
"""Why a request goes to its engine. only: no other can be used. prefix: the session's or the prompt's beginning belongs
there, and it is not much busier than others. least_busy. control: after a wait, or after another engine failed. loaded:
its load was waited for. maker: it has the response. "": none yet."""


class ProxyContext:
    """One worker's connections, counts and measurements, and its access to the control."""

    def __init__(
        self,
        control: Control,
        config: CortexConfig,
        *,
        access_log: AccessLog,
        broker: str | None = None,
    ) -> None:
        """Needs a running loop. `broker` as for `EnginePool`."""
        self.control = control
        self.access_log = access_log
        self.has_keys = False  # as `Gateway` says
        self.configure(config)
        self.pool = EnginePool(broker=broker)
        self._hinted: set[str] = set()  # models whose operator knows why they refuse tools
        self.in_flight = InFlight()
        self.missing_paths = MissingPaths()
        self.stream_usages = StreamUsages()
        self.speeds = Speeds()
        self.counters = RequestTally()
        self.tracing: Tracing | None = None
        self.requests = RequestRing()
        self.usage: UsageLog = NoUsageLog()
        self.tasks = TaskSet()
        self._token_counter = TokenCounter()
        self.expected_tokens = ExpectedTokens()

    def configure(self, config: CortexConfig) -> None:
        """Applies this configuration to requests that arrive from now on."""
        routing, waiting, gateway = config.routing, config.waiting, config.gateway
        self.affinity = Affinity(routing.session_header, routing.prefix_chars)
        self.load_factor = routing.load_factor
        self.keep_alive = KeepAlivePolicy(
            waiting.first_comment_secs,
            waiting.comment_interval_secs,
            gateway.keepalive_secs,
            whitespace=waiting.plain_keepalive == "whitespace",
        )
        self.default_model = gateway.default_model  # for requests that name none

    async def resolve(
        self,
        request: Request,
        model_id: str,
        failures: Sequence[Failure],
        caller: Caller,
        is_able: Callable[[ServedPaths], bool],
    ) -> Route:
        """As `Control.resolve`, for this request. `is_able`: whether engines that serve these paths can answer it.

        Raises:
            ServiceError: it cannot be served. Before it costs a load: no engine of the model would serve its path, or
                it certainly exceeds the context that the model would have.
        """
        if model_id not in self.control.table:
            prospect = await self.control.prospect(model_id)
            if prospect.served is not None and not is_able(prospect.served):
                raise not_served(model_id, request.path, prospect.served)
            if prospect.context is not None and request.path in SIZED:
                await self._check_length(request, prospect.context)
        tokens = self.expected_tokens.of(request, caller.key_id, model_id) if caller.key_id else 0.0
        return await self.control.resolve(model_id, failures, caller, tokens)

    async def _check_length(self, request: Request, bound: ContextBound) -> None:
        size = prompt_size(request.path, request.body)
        # No token is shorter than a byte; a special one may come on top.
        if max(size.limit, size.tokens, len(size.text.encode())) < bound.tokens:
            return
        tokenizer = await asyncio.to_thread(local_tokenizer, bound.source)
        longest = LONGEST_TOKEN_CHARS if tokenizer is None else tokenizer.longest_token
        error = excess(size, bound.tokens, longest)
        if error is None and tokenizer is not None and size.text:
            size = await self._token_counter.counted(size, tokenizer, bound.tokens)
            error = excess(size, bound.tokens, longest)
        if error is not None:
            raise error

    def count(self, replica: Replica, key_id: str) -> None:
        """A request is about to be sent to this replica, from a client with this API key."""
        self.in_flight.add(replica.key, key_id)
        if replica.adapter is not None:
            self.in_flight.add(adapter_key(replica.adapter, replica.key))

    def uncount(self, replica: Replica, key_id: str) -> None:
        """Takes `count` back."""
        self.in_flight.remove(replica.key, key_id)
        if replica.adapter is not None:
            self.in_flight.remove(adapter_key(replica.adapter, replica.key))

    def keep_alive_stream(
        self, client: ClientConnection, request: Request, request_id: str, name: str, *, cold: bool
    ) -> KeepAliveStream:
        note = self.control.note
        return KeepAliveStream(client, request, request_id, name, note=note, policy=self.keep_alive, cold=cold)

    def finished(self, replica: Replica, key_id: str) -> None:
        """A request at this replica has ended, or is given up."""
        self.uncount(replica, key_id)
        if replica.limit is not None:
            self.control.release(replica)

    def choose(self, request: Request, replicas: tuple[Replica, ...]) -> tuple[Replica, Choice]:
        """Of several replicas the one with the least work, or one with the prompt's prefix in its cache and not much
        more work; and why."""
        keys: list[ReplicaKey] = []
        names: list[str] = []
        outstanding: list[int] = []
        for replica in replicas:
            keys.append(replica.key)
            names.append(replica.name)
            outstanding.append(self.in_flight.count(replica.key) + replica.others)
        key = self.affinity.key(request.path, request.passed, request.body)
        chosen = replicas[choose(names, outstanding, self.speeds.of(keys), key, self.load_factor)]
        return chosen, "least_busy" if key is None else "prefix"

    def measure(self, replica: Replica, request: Request, relay: Relay) -> None:
        """Records the speed of the engine, if its answer is complete."""
        if relay.status != 200 or relay.lost_because is not None or request.path not in INFERENCE:
            return  # any other path: a client must not add kinds without limit
        key, answer = replica.key, relay.answer
        kind = key.model_id, request.path, answer.events
        self.speeds.learn(kind, key, monotonic() - request.received, answer.tail.fed_bytes)

    def count_answer(
        self, model_id: str, model: str, node: str, relay: Relay, *, retrieved: bool = False
    ) -> Usage | None:
        """Counts the tokens of an answer that says them, or its loss. `model` and `node` are metric labels.
        `retrieved`: the answer was made for an earlier request, so its tokens do not count."""
        if relay.lost_because is not None:
            self.counters.error(model, node, ErrorCode.UPSTREAM_LOST.value)
        usage = None if retrieved else relay.answer.usage()
        if usage is not None:
            self.counters.tokens(model, node, usage.prompt, usage.completion, usage.cached)
        if relay.status == 400:
            self._hint_at_tools(model_id, node, relay.answer.refusal())
        return usage

    def may_use_all_responses(self, caller: Caller) -> bool:
        """Whether the caller may use stored responses that were made for others, or that cortex does not know."""
        return not self.has_keys or may(caller.role, "operator")

    async def find_maker(self, response_id: str, caller: Caller) -> Replica | None:
        """The engine that made a response, as it was then; None if it is unknown, or the caller may not use the
        response. Asks the control if this worker does not know it: another may have just passed it on."""
        return self._usable(await self.control.response_maker(response_id), caller)

    def _usable(self, maker: ResponseMaker | None, caller: Caller) -> Replica | None:
        if maker is None or (maker.key_id != caller.key_id and not self.may_use_all_responses(caller)):
            return None
        return maker.engine

    def published_maker(self, response_id: str, caller: Caller) -> Replica | None:
        """The engine that made a response, with the adapter that did, if it is known and can be used without asking
        the control. None if the caller may not use the response."""
        known = self._usable(self.control.response_owners.find(response_id), caller)
        return None if known is None else self._published(known)

    async def loaded_maker(self, known: Replica) -> Replica | None:
        """The engine that made a response, as it is now; None if it is not loaded any more."""
        return self._published(known) or _as_maker(await self.control.engine(known.key), known)

    def _published(self, known: Replica) -> Replica | None:
        replicas = self.control.table.get(known.model_id, ())
        return _as_maker(next((replica for replica in replicas if replica.name == known.name), None), known)

    def learn_owner(self, maker: ResponseMaker, start: bytes) -> bool:
        """Remembers who made a response, once its id is in the answer's start. False to be called again."""
        found = response_id(start)
        if found is not None:
            self.control.tell_owner(found, maker)
        return found is not None or len(start) >= SEARCHED_BYTES

    def _hint_at_tools(self, model_id: str, node: str, refusal: bytes) -> None:
        """Tells the operator, once a model, why clients cannot offer it tools. `refusal` is the engine's error."""
        if model_id not in self._hinted and AUTO_TOOL_CHOICE in refusal:
            self._hinted.add(model_id)
            log.warning("%s on %s refused a request with tools: %s", model_id, node, TOOLS_HINT)

    async def close(self) -> None:
        await self.tasks.close()
        await self.usage.close()
        if self.tracing is not None:
            await self.tracing.close()
        await self._token_counter.close()
        self.pool.close()
        self.access_log.flush()


def _as_maker(engine: Replica | None, known: Replica) -> Replica | None:
    """The engine as it is now, with the adapter that it had for the response."""
    if engine is None or known.adapter is None:
        return engine
    return msgspec.structs.replace(engine, adapter=known.adapter)
