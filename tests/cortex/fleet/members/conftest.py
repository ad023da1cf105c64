"""A PostgreSQL that several cortexes share."""

from __future__ import annotations

from tests.postgresql import new_postgresql, postgresql_server

__all__ = ["new_postgresql", "postgresql_server"]
