"""A PostgreSQL that several cortexes share, and the event loops of tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from tests.postgresql import new_postgresql, postgresql_server

__all__ = ["new_postgresql", "postgresql_server"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The broker and neuron run on uvloop where it is installed. Its transports differ from asyncio's with TLS, and
    once a connection is lost."""
    if item.path.name == "test_dialled.py":
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
