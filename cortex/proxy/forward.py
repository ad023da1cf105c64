"""A client's request from its `model` to its answer: decide, load, wait, forward, and try again where that is safe."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from cortex.catalogue import Catalogue
from cortex.fleet import Fleet
from cortex.in_flight import InFlight
from cortex.loader import Loader
from cortex.metrics import Metrics
from cortex.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.poller import NodeWatch
from cortex.proxy.body import find_model
from cortex.proxy.relay import EngineUnreachable, Outcome, Relay
from cortex.routing import Await, Load, Refuse, Serve, decide
from shared.errors import ServiceError, UpstreamError
from shared.http import request_id_of
from shared.protocol import EndpointReply, ModelStatus

log = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Decisions for one request. A request normally takes two (load, serve); this ends a fleet that flaps."""

MAX_ATTEMPTS = 3
"""Engines that one request may be sent to: a request that kills its engine must not kill the fleet."""

UNKNOWN = "unknown"
"""The metrics' label for a model or a neuron that does not exist."""


@dataclass
class Journey:
    """What is known of a request on its way; becomes its log line and its metrics."""

    request_id: str
    started: float
    model_id: str
    node: str = UNKNOWN
    cold: bool = False
    attempts: int = 0


class Forwarder:
    """Serves every route whose body names a model."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        fleet: Fleet,
        loader: Loader,
        clients: Mapping[str, NeuronClient],
        watches: Mapping[str, NodeWatch],
        in_flight: InFlight,
        metrics: Metrics,
        session: aiohttp.ClientSession,
    ) -> None:
        self._catalogue = catalogue
        self._fleet = fleet
        self._loader = loader
        self._clients = clients
        self._watches = watches
        self._in_flight = in_flight
        self._metrics = metrics
        self._session = session
        self._endpoints: dict[tuple[str, str], tuple[object, EndpointReply]] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The handler of the inference routes."""
        journey = Journey(request_id_of(request), time.monotonic(), UNKNOWN)
        outcome = Outcome()
        try:
            body = await request.read()
            field = find_model(body, request.headers.get("Content-Type", ""))
            model_id = self._catalogue.resolve(field.model)
            if model_id != field.model:
                body = field.replaced(body, model_id)
            journey.model_id = model_id
            return await self._serve(request, body, journey, outcome)
        except web.HTTPRequestEntityTooLarge:
            outcome.status = 413
            self._metrics.error(self._label(journey), journey.node, "request_too_large")
            raise
        except ServiceError as error:
            outcome.status = error.status
            self._metrics.error(self._label(journey), journey.node, error.code)
            raise
        finally:
            self._account(request, journey, outcome)

    async def _serve(self, request: web.Request, body: bytes, journey: Journey, outcome: Outcome) -> web.StreamResponse:
        unreachable: dict[str, str] = {}
        for _ in range(MAX_ROUNDS):
            decision = decide(journey.model_id, self._catalogue, self._fleet.snapshot(), self._in_flight.count)
            match decision:
                case Serve(nodes):
                    untried = [node for node in nodes if node not in unreachable]
                    if not untried or journey.attempts >= MAX_ATTEMPTS:
                        break
                    journey.node = untried[0]
                    answer = await self._attempt(request, body, journey, outcome, unreachable)
                    if answer is not None:
                        return answer
                case Await(node):
                    journey.cold = True
                    await self._wait_for(journey.model_id, node)
                    unreachable.pop(node, None)
                case Load():
                    journey.cold = True
                    await self._load(decision)
                    unreachable.pop(decision.node, None)
                case Refuse(error):
                    raise error
        tried = "; ".join(f"{node}: {reason}" for node, reason in unreachable.items()) or "the fleet keeps changing"
        raise UpstreamError(
            f"no engine with {journey.model_id!r} can be reached ({tried})", code="upstream_unreachable"
        )

    async def _attempt(
        self,
        request: web.Request,
        body: bytes,
        journey: Journey,
        outcome: Outcome,
        unreachable: dict[str, str],
    ) -> web.StreamResponse | None:
        """One engine. None when it cannot be reached: then the neuron is asked what became of it."""
        model_id, node = journey.model_id, journey.node
        with self._in_flight.counted(model_id, node):
            remembered = (model_id, node) in self._endpoints
            endpoint = await self._endpoint(model_id, node)
            if endpoint is None:
                return None
            journey.attempts += 1
            relay = Relay(self._session, request, body, journey.request_id, node, journey.cold)
            try:
                return await relay.send(endpoint, outcome)
            except EngineUnreachable as error:
                log.warning("%s on %s cannot be reached: %s", model_id, node, error)
                self._endpoints.pop((model_id, node), None)
                if not remembered:  # a remembered endpoint may have moved: it is asked for again first
                    unreachable[node] = str(error)
        await self._watches[node].refresh()
        return None

    async def _endpoint(self, model_id: str, node: str) -> EndpointReply | None:
        """Where the engine is, remembered until its entry changes. None when the model has just left the neuron.

        Raises:
            UpstreamError: the neuron lists the model as loaded and gives no endpoint.
        """
        view = self._fleet.snapshot().nodes[node].models.get(model_id)
        # An entry made here right after a load has no `since`; the neuron's own word on it replaces it a moment later.
        version = None if view is None else (view.since, self._instance(node))
        known = self._endpoints.get((model_id, node))
        if known is not None and known[0] == version:
            return known[1]
        try:
            endpoint = await self._clients[node].endpoint(model_id)
        except (NeuronRefused, NeuronUnreachable) as error:
            await self._watches[node].refresh()
            now = self._fleet.snapshot().nodes[node]
            if not now.healthy or now.status_of(model_id) is not ModelStatus.LOADED:
                return None
            raise UpstreamError(
                f"{node} gives no endpoint for {model_id!r}: {error}", code="endpoint_unresolved"
            ) from error
        if view is not None and view.since is not None:  # a seed neuron gives nothing that tells a reload
            self._endpoints[model_id, node] = version, endpoint
        return endpoint

    def _instance(self, node: str) -> str | None:
        discovery = self._fleet.snapshot().nodes[node].discovery
        return None if discovery is None else discovery.instance_id

    async def _load(self, decision: Load) -> None:
        if not await self._loader.join(decision.command.model_id):
            await self._loader.load(decision)

    async def _wait_for(self, model_id: str, node: str) -> None:
        if not await self._loader.join(model_id):
            await self._loader.wait_until_settled(model_id, node, timeout_secs=self._loader.timeout_secs)

    def _label(self, journey: Journey) -> str:
        """The model as a label: only ids that exist, so that clients cannot make up time series."""
        known = self._catalogue.profile(journey.model_id) is not None
        return journey.model_id if known or self._fleet.snapshot().holders(journey.model_id) else UNKNOWN

    def _account(self, request: web.Request, journey: Journey, outcome: Outcome) -> None:
        took = time.monotonic() - journey.started
        model = self._label(journey)
        status = outcome.status or 499  # nginx's number for a client that left before its answer
        self._metrics.request(model, journey.node, status, took)
        if outcome.first_byte_at is not None:
            self._metrics.first_byte(model, journey.node, outcome.first_byte_at - journey.started)
        if outcome.lost is not None:
            self._metrics.error(model, journey.node, "upstream_lost")
        if outcome.usage is not None:
            self._metrics.tokens(model, journey.node, prompt=outcome.usage.prompt, completion=outcome.usage.completion)
        log.info(
            "%s %s %d model=%s node=%s cold=%s bytes=%d secs=%.3f id=%s%s",
            request.method,
            request.path,
            status,
            model,
            journey.node,
            "yes" if journey.cold else "no",
            outcome.sent_bytes,
            took,
            journey.request_id,
            f" lost={outcome.lost!r}" if outcome.lost else "",
        )
