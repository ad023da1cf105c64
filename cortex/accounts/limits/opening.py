"""The limits of a running cortex."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from cortex.accounts.database.source import DatabaseError
from cortex.accounts.limits.kept_state import left_by_crash
from cortex.accounts.limits.limiter import LimitOwner
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.shared_limiter import SharedLimiter

if TYPE_CHECKING:  # imports SQLAlchemy
    from cortex.accounts.database.database import Database
    from cortex.accounts.database.limit_states import LimitStates

log = logging.getLogger(__name__)


async def open_limiter(model_terms: ModelTermsTable, database: Database | None) -> LimitOwner:
    """With PostgreSQL, limits are shared with the other cortexes that use it.

    Raises:
        DatabaseError: the database cannot be used.
    """
    if database is None or database.read_only:
        return LocalLimiter(model_terms)
    from cortex.accounts.database.limit_states import LimitStates  # noqa: PLC0415 - imports SQLAlchemy

    states = LimitStates(database)
    if database.is_postgresql:
        return SharedLimiter(model_terms, states)
    return LocalLimiter(model_terms, states, kept=await kept_states(states, time.time()))


async def kept_states(states: LimitStates, now: float) -> dict[str, dict[str, Any]]:
    """What was written before this start, by scope. The table gets the time of the start after a crash.

    Raises:
        DatabaseError: the table cannot be read.
    """
    kept = await states.all()
    left = left_by_crash(kept, now)
    try:
        if left:
            await states.write(left, now)
    except DatabaseError as error:
        log.warning("cannot save limits; a crash may be charged to a later window: %s", error)
    return {**kept, **left}
