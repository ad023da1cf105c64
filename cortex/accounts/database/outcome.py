"""What the client of a request learns when the database cannot be used."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from cortex.accounts.database.source import DatabaseError
from shared.errors import Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import DATABASE_DOWN_SECS

Result = TypeVar("Result")


async def outcome_of(work: Awaitable[Result]) -> Result:
    """What this work on the database returns.

    Raises:
        Unavailable: the database cannot be used.
    """
    try:
        return await work
    except DatabaseError as error:
        raise Unavailable(str(error), code=ErrorCode.DATABASE_UNAVAILABLE, retry_after=DATABASE_DOWN_SECS) from error
