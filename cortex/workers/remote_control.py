"""A worker's view of the control process, at the other end of its channel."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.sign_in.person import Identified
from cortex.config.aliases import Rewrite
from cortex.http.errors import shutting_down
from cortex.routing.control import Prospect
from cortex.routing.replica import Failure, Replica, ReplicaKey, Route, WaitNote
from cortex.routing.response_owners import ResponseMaker, ResponseOwners
from cortex.workers.messages import (
    AskEngine,
    AskEngineEnd,
    AskMaker,
    AskPerson,
    AskProspect,
    CancelResolve,
    CatalogueChanged,
    DownChanged,
    EngineEnd,
    EngineFound,
    MakerFound,
    Notes,
    PersonFound,
    ProspectFound,
    Refused,
    Released,
    Resolve,
    Resolved,
    ResponseMade,
    RouteUnused,
    Setup,
    TableChanged,
    error_from_wire,
)
from cortex.workers.remote_limiter import RemoteLimiter
from shared.request_ids import current_request_id


class RemoteControl:
    """Implements `routing.control.Control` and `accounts.sign_in.person.People`."""

    def __init__(self, setup: Setup, send: Callable[[Any], None]) -> None:
        self.table: dict[str, tuple[Replica, ...]] = dict(setup.table)
        self._aliases = setup.aliases
        self._models = frozenset(setup.models)
        self.down: Collection[str] = frozenset(setup.down)
        self.limiter = RemoteLimiter(setup.limited_models, send)
        self.response_owners = ResponseOwners(setup.responses)
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Route]] = {}
        self._asking: dict[int, asyncio.Future[Any]] = {}  # about an engine
        self._notes: dict[str, WaitNote] = {}
        self._gone = False

    @property
    def aliases(self) -> Mapping[str, Rewrite]:
        return self._aliases

    def knows(self, model_id: str) -> bool:
        return model_id in self._models

    async def resolve(
        self, model_id: str, failures: Sequence[Failure] = (), caller: Caller = ANONYMOUS, tokens: float = 0.0
    ) -> Route:
        """As `cortex.control.resolver.Resolver.resolve`. Raises Unavailable if the control is gone."""
        if self._gone:
            raise shutting_down()
        number = next(self._numbers)
        future: asyncio.Future[Route] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._send(Resolve(number, model_id, list(failures), current_request_id(), caller, tokens))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(future.result())  # it came just before
            raise
        finally:
            del self._waiting[number]
            if future.cancelled():
                self._send(CancelResolve(number))
            if not self._waiting:
                self._notes = {}  # outdated at the next wait

    async def prospect(self, model_id: str) -> Prospect:
        found: Prospect | None = await self._ask(AskProspect(next(self._numbers), model_id))
        return found or Prospect()

    async def engine(self, key: ReplicaKey) -> Replica | None:
        found: Replica | None = await self._ask(AskEngine(next(self._numbers), key))
        return found

    async def engine_end(self, replica: Replica) -> str | None:
        reason: str | None = await self._ask(AskEngineEnd(next(self._numbers), replica))
        return reason

    async def identify(self, credential: bytes) -> Identified:
        found: Identified | None = await self._ask(AskPerson(next(self._numbers), credential))
        if found is None:
            raise shutting_down()
        return found

    async def response_maker(self, response_id: str) -> ResponseMaker | None:
        known = self.response_owners.find(response_id)
        if known is None:
            known = await self._ask(AskMaker(next(self._numbers), response_id))
        return known

    async def _ask(self, question: AskProspect | AskEngine | AskEngineEnd | AskMaker | AskPerson) -> Any:
        """The answer; None if the control is gone."""
        if self._gone:
            return None
        number = question.number
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asking[number] = future
        self._send(question)
        try:
            return await future
        finally:
            del self._asking[number]

    def take(self, replica: Replica) -> bool:
        """Never: only the control knows how many requests the other workers have there."""
        return False

    def release(self, replica: Replica) -> None:
        self._send(Released(replica))

    def _resolved(self, number: int, route: Route) -> None:
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_result(route)
        else:
            self._give_back(route)

    def _give_back(self, route: Route) -> None:
        """A route that is not used."""
        self._send(RouteUnused(route.replica))

    def tell_owner(self, response_id: str, maker: ResponseMaker) -> None:
        self.response_owners.add(response_id, maker)
        self._send(ResponseMade(response_id, maker))

    def note(self, model_id: str) -> WaitNote | None:
        """The last reported progress of a model that this worker waits for."""
        return self._notes.get(model_id)

    def receive(
        self,
        message: TableChanged
        | CatalogueChanged
        | DownChanged
        | ResponseMade
        | Resolved
        | Refused
        | ProspectFound
        | EngineFound
        | EngineEnd
        | PersonFound
        | MakerFound
        | Notes,
    ) -> None:
        """Applies a message from the control."""
        match message:
            case TableChanged(model_id, replicas):
                if replicas:
                    self.table[model_id] = replicas
                else:
                    self.table.pop(model_id, None)
            case ResponseMade(response_id, maker):
                self.response_owners.add(response_id, maker)
            case Notes(by_model):
                self._notes = by_model
            case DownChanged(neurons):
                self.down = frozenset(neurons)
            case CatalogueChanged(models, aliases, limited_models):
                self.limiter.limited_models = frozenset(limited_models)
                self._models = frozenset(models)
                self._aliases = aliases
            case Resolved(number, route):
                self._resolved(number, route)
            case Refused(number):
                future = self._waiting.get(number) or self._asking.get(number)
                if future is not None and not future.done():
                    future.set_exception(error_from_wire(message))
            case (
                ProspectFound(number, answer)
                | EngineFound(number, answer)
                | EngineEnd(number, answer)
                | PersonFound(number, answer)
                | MakerFound(number, answer)
            ):
                asking = self._asking.get(number)
                if asking is not None and not asking.done():
                    asking.set_result(answer)

    def lost(self) -> None:
        """The control is gone: fails all waiting requests, and later ones."""
        self._gone = True
        self.limiter.lost()
        for asking in self._asking.values():
            if not asking.done():
                asking.set_result(None)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(shutting_down())
