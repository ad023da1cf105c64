"""A PostgreSQL for the tests of the database."""

from __future__ import annotations

from tests.postgresql import new_postgresql, postgresql_server

__all__ = ["new_postgresql", "postgresql_server"]
