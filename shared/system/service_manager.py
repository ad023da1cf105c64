"""systemd's side of a service: it learns that the service is ready, and keeps its sockets open while it restarts
(sd_notify(3), sd_listen_fds(3)). Without systemd nothing here does anything."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)

FIRST_FD = 3
"""Where the sockets that systemd passes on begin."""
MAX_FDS = 253
"""How many descriptors Linux passes in one message (SCM_MAX_FD)."""


def notify_ready() -> None:
    """The service serves: `Type=notify` in its unit waits for this."""
    _notify("READY=1")


def keep_sockets(name: str, socks: Sequence[socket.socket]) -> None:
    """Has systemd keep these sockets, and no earlier ones of this name, for the next process of this service. It needs
    `FileDescriptorStoreMax=` in the unit."""
    drop_sockets(name)
    for first in range(0, len(socks), MAX_FDS):
        _notify(f"FDSTORE=1\nFDNAME={name}", socks[first : first + MAX_FDS])


def drop_sockets(name: str) -> None:
    """Has systemd close what it keeps under this name."""
    _notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def passed_sockets() -> dict[str, list[socket.socket]]:
    """The sockets that systemd passed to this process, by name: those of `keep_sockets`, and those of a .socket unit.
    Empty on a second call."""
    variables = {name: os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if variables["LISTEN_PID"] != str(os.getpid()):
        return {}
    names = variables["LISTEN_FDNAMES"].split(":")
    found: dict[str, list[socket.socket]] = {}
    for number in range(int(variables["LISTEN_FDS"])):
        fd = FIRST_FD + number
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        found.setdefault(names[number] if number < len(names) else "unknown", []).append(sock)
    return found


def _notify(state: str, socks: Sequence[socket.socket] = ()) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # in the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        try:
            channel.connect(address)
            socket.send_fds(channel, [state.encode()], [sock.fileno() for sock in socks])
        except OSError as error:
            log.warning("cannot notify systemd (%s): %s", state.partition("\n")[0], error.strerror)
