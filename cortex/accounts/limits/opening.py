"""The limits of a running cortex."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortex.accounts.limits.limiter import LimitOwner
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.shared_limiter import SharedLimiter

if TYPE_CHECKING:  # imports SQLAlchemy
    from cortex.accounts.database.database import Database


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
    return LocalLimiter(model_terms, states, kept=await states.all())
