"""What operators have decided about neurons and models: which are drained, and which are held back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING

from cortex.accounts.database.source import DatabaseError
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.routing.replica import ANY_NODE, ModelOnNode
from shared.errors import Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import CONTROL_PROCESS_SECS
from shared.tasks import TaskSet

if TYPE_CHECKING:  # imports SQLAlchemy
    from cortex.accounts.database.database import Database
    from cortex.accounts.database.operator_decisions import OperatorDecisions

log = logging.getLogger(__name__)

LOOK_SECS = 1.0
"""How often the database is read for what other cortexes were told."""
END_HOLDS_SECS = 3.0
"""How long a load of a model that is held back waits for the database."""


class Decisions:
    """Carries them out. With PostgreSQL the tables there are the truth for all cortexes that use it, and the state file
    is a copy of what was read last; otherwise the state file has them."""

    def __init__(self, state: StateFile, fleet: Fleet, tables: OperatorDecisions | None = None) -> None:
        self._state = state
        self._fleet = fleet
        self._tables = tables
        self._changing = asyncio.Lock()  # what was read before a change must not undo it
        self._failing = False
        self._tasks = TaskSet()

    @property
    def drained(self) -> Collection[str]:
        """Names of drained neurons, including absent ones."""
        return self._state.drained

    @property
    def problem(self) -> str | None:
        """Why they do not survive a restart; None if they do."""
        return self._state.problem if self._tables is None else None

    @property
    def loops(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """What has to run all the time, by name."""
        return {} if self._tables is None else {"operators' decisions": self.follow_loop}

    async def set_drained(self, name: str, drained: bool) -> None:
        """Returns once that is written. Raises Unavailable if the database cannot be used."""
        async with self._changing:
            if self._tables is not None:
                what = f"{name} was not {'drained' if drained else 'resumed'}"
                await _written(what, self._tables.add([name], {}) if drained else self._tables.resume(name))
            self._drain(name, drained)
        await self._state.flush()

    async def hold_back(self, key: ModelOnNode, until: float) -> None:
        """The model is not to be loaded there before this Unix time. Returns and raises as `set_drained`."""
        async with self._changing:
            if self._tables is not None:
                await _written(f"{key[0]} was not held back", self._tables.add([], {key: until}))
            self._state.hold_back(key, until)
            self._fleet.notify()
        await self._state.flush()

    async def end_holds(self, model_id: str, node: str | None) -> None:
        """The model may be loaded on this neuron again, with None on all. Raises Unavailable if it is held back there
        and the database cannot be used, or does not answer soon. Does not wait for the database if it is not."""
        if self._tables is None:
            self._end_known_holds(model_id, node)
            return
        places = None if node is None else (node, ANY_NODE)
        held = any(model == model_id and (places is None or at in places) for model, at in self._state.holds)
        # Not the caller's own work: a command that hangs cannot be cancelled quickly. Another cortex may have begun a
        # hold that has not been read yet, so the database is told even if none is known.
        ending = self._tasks.spawn(self._end_holds(self._tables, model_id, node), name=f"end of holds of {model_id}")
        if not held:
            return
        await asyncio.wait([ending], timeout=END_HOLDS_SECS)
        error = (
            ending.result() if ending.done() else DatabaseError(f"no answer from PostgreSQL in {END_HOLDS_SECS:g} s")
        )
        if error is not None:
            raise _not_changed(f"{model_id} is still held back", error) from error

    async def close(self) -> None:
        """Ends what still waits for the database."""
        await self._tasks.close()

    async def follow_loop(self) -> None:
        """Takes over what other cortexes were told; while the database cannot be read nothing changes. Never
        returns."""
        while True:
            await asyncio.sleep(LOOK_SECS)
            try:
                await self.look()
            except DatabaseError as error:
                if not self._failing:
                    log.warning("drains and holds of other cortexes cannot be read: %s", error)
                self._failing = True
            else:
                if self._failing:
                    log.info("drains and holds of other cortexes can be read again")
                self._failing = False

    async def look(self) -> None:
        """Reads the tables once. Those of another database than before, or of an older copy of it, first get what the
        state file has. Raises DatabaseError."""
        if self._tables is None:
            self._state.decisions_version = None
            return
        async with self._changing:
            known = self._state.decisions_version
            version, drained, holds = await self._tables.all()
            same = known is not None and known[0] == version[0]
            seen = known[1] if known is not None and same else 0
            if not same or version[1] < seen:
                if self._state.drained or self._state.holds:
                    log.info("the database is new or an older copy: it gets the drains and holds of the state file")
                await self._tables.add(self._state.drained, self._state.holds, seen=seen)
                version, drained, holds = await self._tables.all()
            self._state.decisions_version = version
            for name in drained ^ set(self._state.drained):
                self._drain(name, name in drained)
            if holds != self._state.holds:
                self._state.replace_holds(holds)
                self._fleet.notify()

    async def _end_holds(self, tables: OperatorDecisions, model_id: str, node: str | None) -> DatabaseError | None:
        """Returns why it failed, or None."""
        async with self._changing:
            try:
                await tables.end_holds(model_id, None if node is None else (node, ANY_NODE))
            except DatabaseError as error:
                return error
            self._end_known_holds(model_id, node)
            return None

    def _end_known_holds(self, model_id: str, node: str | None) -> None:
        if self._state.end_holds(model_id, node):
            self._fleet.notify()

    def _drain(self, name: str, drained: bool) -> None:
        if name in self._fleet.snapshot().nodes:
            self._fleet.set_draining(name, drained)
        self._state.set_drained(name, drained)


async def open_decisions(state: StateFile, fleet: Fleet, database: Database | None) -> Decisions:
    """Raises DatabaseError if the database cannot be used."""
    tables = None
    if database is not None and database.is_postgresql:
        from cortex.accounts.database.operator_decisions import OperatorDecisions  # noqa: PLC0415 - imports SQLAlchemy

        tables = OperatorDecisions(database)
    decisions = Decisions(state, fleet, tables)
    await decisions.look()
    return decisions


async def _written(what: str, work: Awaitable[None]) -> None:
    try:
        await work
    except DatabaseError as error:
        raise _not_changed(what, error) from error


def _not_changed(what: str, error: DatabaseError) -> Unavailable:
    message = f"{what}: {error}; repeat the command once the database can be used"
    return Unavailable(message, code=ErrorCode.DATABASE_UNAVAILABLE, retry_after=CONTROL_PROCESS_SECS)
