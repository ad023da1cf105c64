"""What operators have decided, for all cortexes that use one PostgreSQL: drained neurons and models held back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from cortex.accounts.database.tables import DECISIONS_VERSION, DRAINED_NODES, HELD_MODELS

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from cortex.accounts.database.database import Database

Holds = Mapping[tuple[str, str], float]
"""Until when models are held back, in Unix time, by model and neuron."""

Version = tuple[str, int]
"""The database's id, and how often the decisions there have changed."""


class OperatorDecisions:
    """The two tables. Every method raises DatabaseError if the database cannot be used now."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> tuple[Version, set[str], Holds]:
        """The version, the drained neurons, and the holds that have not ended: these may be newer than the version."""
        async with self._database.reading() as connection:
            row = (await connection.execute(select(DECISIONS_VERSION.c.id, DECISIONS_VERSION.c.changes))).one()
            drained = await connection.execute(select(DRAINED_NODES.c.node))
            held = await connection.execute(select(HELD_MODELS).where(HELD_MODELS.c.until > time.time()))
            holds = {(str(model), str(node)): until for model, node, until in held}
            return (str(row.id), int(row.changes)), {str(node) for (node,) in drained}, holds

    async def add(self, drained: Iterable[str], holds: Holds, *, seen: int = 0) -> None:
        """Adds these; a hold of the same model and neuron ends when the new one does. `seen`: the version's number will
        be higher than this one."""
        nodes = [{"node": name} for name in drained]
        held = [{"model": model, "node": node, "until": until} for (model, node), until in holds.items()]
        async with self._database.writing() as connection:
            if nodes:
                await connection.execute(insert(DRAINED_NODES).on_conflict_do_nothing(), nodes)
            if held:
                row = insert(HELD_MODELS)
                await connection.execute(
                    row.on_conflict_do_update(index_elements=["model", "node"], set_={"until": row.excluded.until}),
                    held,
                )
                await connection.execute(delete(HELD_MODELS).where(HELD_MODELS.c.until <= time.time()))
            await _count_change(connection, seen)

    async def resume(self, name: str) -> None:
        async with self._database.writing() as connection:
            await connection.execute(delete(DRAINED_NODES).where(DRAINED_NODES.c.node == name))
            await _count_change(connection)

    async def end_holds(self, model_id: str, nodes: Iterable[str] | None) -> None:
        """Of this model on these neurons, with None on all."""
        ended = delete(HELD_MODELS).where(HELD_MODELS.c.model == model_id)
        async with self._database.writing() as connection:
            done = await connection.execute(
                ended if nodes is None else ended.where(HELD_MODELS.c.node.in_(list(nodes)))
            )
            if done.rowcount:
                await _count_change(connection)


async def _count_change(connection: AsyncConnection, seen: int = 0) -> None:
    """Last in its transaction: others wait for the row until it ends."""
    changes = func.greatest(DECISIONS_VERSION.c.changes, seen) + 1
    await connection.execute(update(DECISIONS_VERSION).values(changes=changes))
