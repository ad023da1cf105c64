"""The messages between the control process and its workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from cortex.accounts.caller import Caller
from cortex.accounts.keys.key_table import NO_KEYS, KeyTable
from cortex.accounts.limits.exceeded import LimitExceeded
from cortex.accounts.limits.terms import Grant, RateState, TokenBound
from cortex.accounts.prices import NO_PRICES, PriceList
from cortex.accounts.sign_in.person import Identified
from cortex.config.aliases import Rewrite
from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import CallerAt, CallerCount
from cortex.metrics.requests.entries import SeenRequests
from cortex.metrics.requests.filter import RequestFilter
from cortex.routing.control import Prospect
from cortex.routing.replica import Failure, Replica, ReplicaKey, Route, WaitNote
from cortex.routing.response_owners import OwnerList, ResponseMaker
from shared.errors import ServiceError

Counts: TypeAlias = list[tuple[ReplicaKey, int]]
"""Requests by replica. Keys of a JSON object could only be strings."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message to a worker: everything that it needs to start."""

    config: str  # CortexConfig as JSON
    models: list[str]
    aliases: dict[str, Rewrite]
    table: dict[str, tuple[Replica, ...]]
    control_host: str
    down: list[str]  # neurons
    responses: OwnerList = OwnerList([], {})
    limited_models: list[str] = []
    keys: KeyTable = NO_KEYS
    prices: PriceList = NO_PRICES
    usage_directory: str | None = None
    broker: str | None = None  # as for `EnginePool`


class TableChanged(msgspec.Struct, frozen=True, tag=True):
    """The replicas of a model that can be used without asking, from now on."""

    model_id: str
    replicas: tuple[Replica, ...]


class EngineRetired(msgspec.Struct, frozen=True, tag=True):
    """The engine at this URL gets no requests any more: keep no connection to it."""

    url: str


class CatalogueChanged(msgspec.Struct, frozen=True, tag=True):
    """The catalogue's names of models and variants, and its aliases, from now on."""

    models: list[str]
    aliases: dict[str, Rewrite]
    limited_models: list[str] = []
    prices: PriceList = NO_PRICES


class ConfigChanged(msgspec.Struct, frozen=True, tag=True):
    """The configuration from now on, CortexConfig as JSON. Keys that need a restart keep their values."""

    config: str


class KeysChanged(msgspec.Struct, frozen=True, tag=True):
    """The API keys of clients from now on."""

    keys: KeyTable


class DownChanged(msgspec.Struct, frozen=True, tag=True):
    """The neurons that count as down from now on."""

    neurons: list[str]


class ResponseMade(msgspec.Struct, frozen=True, tag=True):
    """An engine has made a response that can be requested again by its id. From a worker, and on to all others."""

    response_id: str
    maker: ResponseMaker


class OthersInFlight(msgspec.Struct, frozen=True, tag=True):
    """The requests that the other workers have in flight."""

    counts: Counts


class Resolved(msgspec.Struct, frozen=True, tag=True):
    """Answers Resolve: the request can be sent."""

    number: int
    route: Route


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Answers Resolve or AskPerson: the request cannot be served, for this ServiceError."""

    number: int
    status: int
    message: str
    code: str
    param: str | None
    retry_after: int | None
    extra: dict[str, Any]
    permanent: bool


class Admitted(msgspec.Struct, frozen=True, tag=True):
    """Answers Admit: the request's limits allow it."""

    number: int
    grant: Grant


class AdmitRefused(Refused, frozen=True, tag=True):
    """Answers Admit: the request is refused. `rates`: of a LimitExceeded."""

    rates: RateState | None = None


class EngineFound(msgspec.Struct, frozen=True, tag=True):
    """Answers AskEngine."""

    number: int
    replica: Replica | None


class ProspectFound(msgspec.Struct, frozen=True, tag=True):
    """Answers AskProspect."""

    number: int
    prospect: Prospect


class MakerFound(msgspec.Struct, frozen=True, tag=True):
    """Answers AskMaker."""

    number: int
    maker: ResponseMaker | None


class EngineEnd(msgspec.Struct, frozen=True, tag=True):
    """Answers AskEngineEnd, with `routing.control.Control.engine_end`."""

    number: int
    reason: str | None


class PersonFound(msgspec.Struct, frozen=True, tag=True):
    """Answers AskPerson. A credential that is not valid is answered by Refused."""

    number: int
    person: Identified


class Notes(msgspec.Struct, frozen=True, tag=True):
    """The progress of the models that the worker waits for."""

    by_model: dict[str, WaitNote]


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Asks for a Counted with the same number. `callers`: with the counts by API key."""

    number: int
    callers: bool = False


class AskRequests(msgspec.Struct, frozen=True, tag=True):
    """Asks for a RequestsSeen with the same number, as of `metrics.requests.ring.RequestRing.since`."""

    number: int
    place: int
    asked: RequestFilter
    limit: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Finish the requests in flight, then exit."""


ToWorker = (
    Setup
    | TableChanged
    | EngineRetired
    | CatalogueChanged
    | ConfigChanged
    | KeysChanged
    | DownChanged
    | OthersInFlight
    | ResponseMade
    | Resolved
    | Refused
    | Admitted
    | AdmitRefused
    | ProspectFound
    | EngineFound
    | EngineEnd
    | PersonFound
    | MakerFound
    | Notes
    | Collect
    | AskRequests
    | Stop
)


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker serves."""


class Resolve(msgspec.Struct, frozen=True, tag=True):
    """Asks for an engine for one request. `failures` are the replicas that it has tried."""

    number: int
    model_id: str
    failures: list[Failure]
    request_id: str | None
    caller: Caller
    tokens: float = 0.0


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Asks whether its limits allow a request. Answered by Admitted or AdmitRefused, with its number."""

    number: int
    caller: Caller
    model_id: str
    bound: TokenBound


class Settle(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The request of a grant has ended, as in `accounts.limits.limiter.Limiter.settle`, or `settle_estimate`."""

    grant: Grant
    prompt: int
    completion: int
    cached: int
    estimated: bool = False


class CancelResolve(msgspec.Struct, frozen=True, tag=True):
    """The request of this Resolve is gone."""

    number: int


class AskEngine(msgspec.Struct, frozen=True, tag=True):
    """Asks for `routing.control.Control.engine`."""

    number: int
    key: ReplicaKey


class AskProspect(msgspec.Struct, frozen=True, tag=True):
    """Asks for `routing.control.Control.prospect`."""

    number: int
    model_id: str


class AskEngineEnd(msgspec.Struct, frozen=True, tag=True):
    """Asks why the engine of a lost answer has ended."""

    number: int
    replica: Replica


class AskMaker(msgspec.Struct, frozen=True, tag=True):
    """Asks for `routing.control.Control.response_maker`."""

    number: int
    response_id: str


class InFlightNow(msgspec.Struct, frozen=True, tag=True):
    """All requests in flight; where it changed since the last report, the number of requests begun; and the requests of
    each API key, with those begun since the last report."""

    counts: Counts
    begun: Counts
    callers: list[tuple[CallerAt, CallerCount]]


class AskPerson(msgspec.Struct, frozen=True, tag=True):
    """Asks whose token or secret of a session this is. Answered by PersonFound or Refused."""

    number: int
    credential: bytes


class Released(msgspec.Struct, frozen=True, tag=True):
    """A request at a replica with a limit has ended."""

    replica: Replica


class RouteUnused(msgspec.Struct, frozen=True, tag=True):
    """The request for which this replica was resolved has ended before: it is never reported in flight."""

    replica: Replica


class Counted(msgspec.Struct, frozen=True, tag=True):
    """Everything counted since the worker started. `number` is that of the Collect, 0 for a worker's final report.
    `callers`: with those by API key."""

    number: int
    counters: Counters
    in_flight: Counts
    callers: bool


class RequestsSeen(msgspec.Struct, frozen=True, tag=True):
    """Answers AskRequests."""

    number: int
    seen: SeenRequests


FromWorker = (
    Ready
    | Resolve
    | CancelResolve
    | Admit
    | Settle
    | Released
    | RouteUnused
    | AskProspect
    | AskEngine
    | AskEngineEnd
    | AskPerson
    | AskMaker
    | InFlightNow
    | ResponseMade
    | Counted
    | RequestsSeen
)


def counts_to_wire(counts: Mapping[ReplicaKey, int]) -> Counts:
    return list(counts.items())


def counts_from_wire(counts: Counts) -> dict[ReplicaKey, int]:
    return dict(counts)


def error_to_wire(number: int, error: ServiceError) -> Refused:
    return Refused(number, *_fields(error))


def refused_to_wire(number: int, error: ServiceError) -> AdmitRefused:
    return AdmitRefused(number, *_fields(error), error.rates if isinstance(error, LimitExceeded) else None)


def _fields(error: ServiceError) -> tuple[int, str, str, str | None, int | None, dict[str, Any], bool]:
    """Those of Refused behind `number`."""
    return error.status, error.message, error.code, error.param, error.retry_after, error.extra, error.permanent


def error_from_wire(refused: Refused) -> ServiceError:
    rates = refused.rates if isinstance(refused, AdmitRefused) else None
    error = (ServiceError if rates is None else LimitExceeded)(
        refused.message,
        code=refused.code,
        param=refused.param,
        retry_after=refused.retry_after,
        extra=refused.extra,
        status=refused.status,
        permanent=refused.permanent,
    )
    if isinstance(error, LimitExceeded) and rates is not None:
        error.rates = rates
    return error
