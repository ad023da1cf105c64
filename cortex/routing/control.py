"""What a worker may ask of its control."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import msgspec

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.limits.limiter import Limiter
from cortex.config.aliases import Rewrite
from cortex.routing.replica import Failure, Replica, ReplicaKey, Route, ServedPaths, WaitNote
from cortex.routing.response_owners import ResponseMaker, ResponseOwners


class ContextBound(msgspec.Struct, frozen=True):
    """No engine of a model that is not loaded would serve more tokens of context than `tokens`. `source` is what it
    loads, with its tokenizer; "" if they differ."""

    tokens: int
    source: str


class Prospect(msgspec.Struct, frozen=True):
    """What an engine of a model that none serves could do at most: its context, its paths; None where that is not
    known."""

    context: ContextBound | None = None
    served: ServedPaths | None = None


class Control(Protocol):
    """The control of a cortex, as its workers see it: in the same process or at the other end of a channel."""

    table: dict[str, tuple[Replica, ...]]
    """Model id or `id@variant` to the replicas that can be used without asking the control."""

    @property
    def aliases(self) -> Mapping[str, Rewrite]:
        """The names of models that engines do not know, `id@variant` included."""

    @property
    def down(self) -> Collection[str]:
        """The neurons that count as down."""

    @property
    def response_owners(self) -> ResponseOwners:
        """Which engines made stored responses."""

    @property
    def limiter(self) -> Limiter:
        """Admits requests within the limits of their callers and models."""

    def knows(self, model_id: str) -> bool: ...

    async def prospect(self, model_id: str) -> Prospect:
        """What a model, or the variant of `id@variant`, could do once it is loaded. Nothing is known of its context
        while its engine starts, and nothing at all while one serves."""

    async def resolve(
        self, model_id: str, failures: Sequence[Failure] = (), caller: Caller = ANONYMOUS, tokens: float = 0.0
    ) -> Route:
        """Waits until the model, or the variant of `id@variant`, can be served, in `caller`'s turn. `tokens`: about how
        many the request will use. `failures` are the replicas that this request has tried.

        Raises:
            ServiceError: the request cannot be served.
        """

    async def engine(self, key: ReplicaKey) -> Replica | None:
        """This engine, None if it serves no more. Does not load it, and takes no place of a replica with a limit."""

    async def engine_end(self, replica: Replica) -> str | None:
        """Why the engine has ended, as its neuron reports it; None if it reports nothing within about a second."""

    def take(self, replica: Replica) -> bool:
        """Whether a request may be sent to this replica of the table, which has a limit; it then counts until
        `release`. A replica of `resolve` is taken already."""

    def release(self, replica: Replica) -> None:
        """A request at a replica with a limit has ended."""

    async def response_maker(self, response_id: str) -> ResponseMaker | None:
        """Who made a stored response, None if it is unknown. Waits a moment if another worker may be about to tell."""

    def tell_owner(self, response_id: str, maker: ResponseMaker) -> None:
        """Remembers which engine made a stored response, also for the other workers and after a restart."""

    def note(self, model_id: str) -> WaitNote | None:
        """Progress of the model, for clients that wait for it; None if unknown."""
