"""The control's side of the broker, a process of its own: the bytes that it passes do not delay the control."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Final

import msgspec

from cortex.config.gateway import parse_listen
from cortex.config.settings import CortexConfig
from shared.logs import LogFormat
from shared.serve import BACKLOG, ListenError, bind
from shared.system.kept_process import KeptProcess

MODULE: Final = "cortex.fleet.members.dialled"
STOP_SECS: Final = 2.0

log = logging.getLogger(__name__)


class BrokerSettings(msgspec.Struct, frozen=True):
    """What the broker is told. `keys`: of the registered neurons, by name."""

    keys: dict[str, str]
    tls_cert: str | None
    tls_key: str | None
    log_level: str
    log_format: LogFormat


class DialBroker:
    """Keeps the broker running. Owns the sockets that it listens on, so that they outlive its process. `address` is the
    Unix socket for cortex's own processes; `connected` are the names of neurons that have connections now."""

    def __init__(self, config: CortexConfig, listening: socket.socket) -> None:
        self._config = config
        self._keys: dict[str, str] = {}
        self._listening = listening
        self._requests = socket.socket(socket.AF_UNIX)
        self._requests.bind("")  # in Linux's abstract namespace: no file is left when the process is killed
        self._requests.listen(BACKLOG)
        self.address = self._requests.getsockname().decode("ascii")
        self.port = int(listening.getsockname()[1])
        self.tls = config.gateway.tls_cert is not None
        self.connected: frozenset[str] = frozenset()
        fds = (listening.fileno(), self._requests.fileno())
        self._process = KeptProcess(
            'the broker for neurons with dial = "out"',
            MODULE,
            [str(fd) for fd in fds],
            first_line=self._settings,
            on_line=self._told,
            on_failure=lambda _: self._told("[]"),
            stop_secs=STOP_SECS,
            pass_fds=fds,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It passes bytes inside the body."""
        with contextlib.closing(self):
            async with self._process.running():
                yield

    def close(self) -> None:
        """Closes its sockets."""
        self._listening.close()
        self._requests.close()

    def use(self, keys: Mapping[str, str]) -> None:
        """These neurons are registered, by name, with the keys that their connections must show."""
        if keys != self._keys:
            self._keys = dict(keys)
            self._process.tell(self._settings())

    def _told(self, line: str) -> None:
        connected = msgspec.json.decode(line, type=frozenset[str])
        for name in sorted(connected - self.connected):
            log.info("neuron %s keeps connections to this cortex", name)
        for name in sorted(self.connected - connected):
            log.warning("neuron %s keeps no connection to this cortex any more", name)
        self.connected = connected

    def _settings(self) -> bytes:
        files = self._config.gateway.tls_files
        return msgspec.json.encode(
            BrokerSettings(
                keys=self._keys,
                tls_cert=None if files is None else str(files.cert),
                tls_key=None if files is None else str(files.key),
                log_level=self._config.log_level,
                log_format=self._config.log_format,
            )
        )


def address_of(broker: DialBroker | None) -> str | None:
    """Where pools find it; see `EnginePool`."""
    return None if broker is None else broker.address


def open_broker(config: CortexConfig) -> DialBroker | None:
    """None unless neurons may dial.

    Raises:
        ListenError: the address is taken.
    """
    listen = config.discovery.dial_listen
    if listen is None or config.discovery.kind != "register":
        return None
    try:
        return DialBroker(config, bind(*parse_listen(listen)))
    except ListenError as error:
        raise ListenError(f"{error} ([discovery] dial_listen)") from error
