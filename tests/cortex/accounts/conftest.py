"""Fixtures of the tests of keys, limits and usage."""

from __future__ import annotations

from tests.postgresql import new_postgresql, own_postgresql_server, postgresql_server

__all__ = ["new_postgresql", "own_postgresql_server", "postgresql_server"]
