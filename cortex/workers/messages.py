"""What control and workers tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import Key
from cortex.upstream.replica import Failure, Replica, Route, WaitNote
from shared.errors import ServiceError


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message to a worker: all that it needs to begin."""

    config: str  # CortexConfig as JSON
    models: list[str]
    aliases: dict[str, str]
    table: dict[str, tuple[Replica, ...]]
    control_host: str


class Changed(msgspec.Struct, frozen=True, tag=True):
    """The replicas of a model that can be used without asking."""

    model_id: str
    replicas: tuple[Replica, ...]


class CatalogueChanged(msgspec.Struct, frozen=True, tag=True):
    """The catalogue's ids and aliases from now on."""

    models: list[str]
    aliases: dict[str, str]


class Elsewhere(msgspec.Struct, frozen=True, tag=True):
    """What the other workers have in flight."""

    counts: list[tuple[str, str, int]]


class Resolved(msgspec.Struct, frozen=True, tag=True):
    number: int
    route: Route


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A ServiceError."""

    number: int
    status: int
    message: str
    code: str
    param: str | None
    retry_after: int | None
    extra: dict[str, Any]


class Notes(msgspec.Struct, frozen=True, tag=True):
    """What is known of the models that the worker waits for."""

    by_model: dict[str, WaitNote]


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Asks for Counted."""

    number: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Finish what is in flight, then end."""


ToWorker = Setup | Changed | CatalogueChanged | Elsewhere | Resolved | Refused | Notes | Collect | Stop


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker serves."""


class Resolve(msgspec.Struct, frozen=True, tag=True):
    number: int
    model_id: str
    failures: list[Failure]
    request_id: str | None


class GiveUp(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this resolution any more."""

    number: int


class InFlightNow(msgspec.Struct, frozen=True, tag=True):
    """What the worker has in flight, and how many requests it has begun, of the models with a change since."""

    counts: list[tuple[str, str, int]]
    begun: list[tuple[str, str, int]]


class Counted(msgspec.Struct, frozen=True, tag=True):
    """Everything counted since the worker began. `number` is that of the Collect, 0 for the last word of a worker."""

    number: int
    tally: Counters
    in_flight: list[tuple[str, str, int]]


FromWorker = Ready | Resolve | GiveUp | InFlightNow | Counted


def counts_to_wire(counts: Mapping[Key, int]) -> list[tuple[str, str, int]]:
    return [(model_id, node, count) for (model_id, node), count in counts.items()]


def counts_from_wire(counts: list[tuple[str, str, int]]) -> dict[Key, int]:
    return {(model_id, node): count for model_id, node, count in counts}


def error_to_wire(number: int, error: ServiceError) -> Refused:
    return Refused(number, error.status, error.message, error.code, error.param, error.retry_after, error.extra)


def error_from_wire(refused: Refused) -> ServiceError:
    error = ServiceError(
        refused.message, code=refused.code, param=refused.param, retry_after=refused.retry_after, extra=refused.extra
    )
    error.status = refused.status
    return error
