"""Sums over the records of usage: the contract, for those that do not import SQLAlchemy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from cortex.accounts.usage.query import EnergyQuery, UsageQuery
from cortex.config.live import LiveConfig
from shared.errors import NotFound

if TYPE_CHECKING:
    from cortex.accounts.database.database import Database

_NO_USAGE: Final = "this cortex keeps no usage: set state_dir in cortex.toml to a directory that it can write"


class UsageReports(Protocol):
    """Sums over the records of usage, and over energy."""

    async def reports(self, queries: Sequence[UsageQuery], currency: str) -> list[list[dict[str, Any]]]:
        """As `DatabaseReports.reports`."""

    async def energy(self, queries: Sequence[EnergyQuery]) -> list[list[dict[str, Any]]]:
        """As `DatabaseReports.energy`."""


class NoUsageReports:
    """Implements UsageReports for a cortex that keeps no usage."""

    async def reports(self, queries: Sequence[UsageQuery], currency: str) -> list[list[dict[str, Any]]]:
        """Raises NotFound."""
        raise NotFound(_NO_USAGE)

    async def energy(self, queries: Sequence[EnergyQuery]) -> list[list[dict[str, Any]]]:
        """Raises NotFound."""
        raise NotFound(_NO_USAGE)


def usage_reports(database: Database | None, live: LiveConfig) -> UsageReports:
    """Those of the database, if there is one."""
    if database is None:
        return NoUsageReports()
    from cortex.accounts.usage.database_reports import DatabaseReports  # noqa: PLC0415 - imports SQLAlchemy

    return DatabaseReports(database, lambda: live.config.usage.retention_days)
