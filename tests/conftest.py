"""Fixtures of every test."""

from __future__ import annotations

import os
import socket
import sys
from asyncio import selector_events
from collections.abc import Iterator
from typing import Any

import pytest

# Otherwise each process that a test starts would compile all modules again, which is half of its start.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_transport: Any = selector_events._SelectorTransport  # type: ignore[attr-defined]
_initialise = _transport.__init__


def _close_what_a_closed_server_accepted(transport: Any, loop: Any, sock: socket.socket, *args: Any) -> None:
    """asyncio accepts a connection in one turn of the loop and makes its transport in the next. If the server is closed
    in between, that raises, and the socket is left to the garbage collector, whose warning fails a test."""
    try:
        _initialise(transport, loop, sock, *args)
    except BaseException:
        sock.close()
        transport._sock = None
        raise


_transport.__init__ = _close_what_a_closed_server_accepted


@pytest.fixture(scope="session", autouse=True)
def _no_state_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Started processes keep their state in a temporary directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("STATE_DIRECTORY", raising=False)
        yield
