"""Sums over the records of usage: the contract, for those that do not import SQLAlchemy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cortex.accounts.usage.query import UsageQuery
from shared.errors import NotFound

if TYPE_CHECKING:
    from cortex.accounts.database.database import Database


class UsageReports(Protocol):
    """Sums over the records of usage."""

    async def reports(self, queries: Sequence[UsageQuery], currency: str) -> list[list[dict[str, Any]]]:
        """As `DatabaseReports.reports`."""


class NoUsageReports:
    """Implements UsageReports for a cortex that keeps no usage."""

    async def reports(self, queries: Sequence[UsageQuery], currency: str) -> list[list[dict[str, Any]]]:
        """Raises NotFound."""
        raise NotFound("this cortex keeps no usage: set state_dir in cortex.toml to a directory that it can write")


def usage_reports(database: Database | None) -> UsageReports:
    """Those of the database, if there is one."""
    if database is None:
        return NoUsageReports()
    from cortex.accounts.usage.database_reports import DatabaseReports  # noqa: PLC0415 - imports SQLAlchemy

    return DatabaseReports(database)
