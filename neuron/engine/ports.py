"""Ports for engines: chosen, checked, and reserved until released; and which processes listen on one."""

from __future__ import annotations

import contextlib
import random
import re
import socket
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

from neuron.engine.connections import listening_inodes
from shared.errors import Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import NO_FREE_PORT_SECS

# sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode (proc(5), /proc/net/tcp)
_LISTENING = rb"^ *\d+: [0-9A-F]+:%04X [0-9A-F]+:0000 0A \S+ \S+ \S+ +\d+ +\d+ (\d+)"
_TIME_WAIT = "06"  # in /proc/net/tcp


class PortPool:
    """Reserves ports of this host. All harnesses share one pool, because their ranges may overlap.

    Resolves `host` once. Raises OSError when it has no address.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        family, *_, address = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._family, self._address = family, str(address[0])
        self._reserved: set[int] = set()
        self._next: dict[tuple[int, int], int] = {}

    @property
    def reserved(self) -> frozenset[int]:
        return frozenset(self._reserved)

    def reserve(self, ports: tuple[int, int], *, lingering: Collection[int] = ()) -> int:
        """Reserves a free port of the range [first, last] until `release`. If all others are taken, one of the
        `lingering` ports (`lingering_ports`) is used.

        Starts at a random port and goes round, so that several neurons on one host rarely collide and a released port
        is reused last.

        Raises:
            Unavailable: every port of the range is taken.
        """
        first, last = ports
        size = last - first + 1
        start = self._next.get(ports, random.randrange(size))  # noqa: S311 - spreads, protects nothing
        for step in range(size):
            port = first + (start + step) % size
            if port in self._reserved:
                continue
            if self._is_free(port) or (port in lingering and self._is_free(port, shared=True)):
                self._reserved.add(port)
                self._next[ports] = (start + step + 1) % size
                return port
        raise Unavailable(
            f"no free port in {first}-{last} on {self._host}",
            code=ErrorCode.NO_FREE_PORT,
            retry_after=NO_FREE_PORT_SECS,
        )

    def claim(self, port: int) -> None:
        """Reserves the port of an adopted engine."""
        self._reserved.add(port)

    def release(self, port: int) -> None:
        self._reserved.discard(port)

    def _is_free(self, port: int, *, shared: bool = False) -> bool:
        """True when the port can be bound. Without SO_REUSEADDR (`shared`) by default: with it, binding also succeeds
        beside an engine that has bound the port and does not listen yet."""
        with socket.socket(self._family, socket.SOCK_STREAM) as probe:
            try:
                if shared:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self._address, port))
                if shared:
                    probe.listen(1)
            except OSError:
                return False
        return True


def listens(pids: Iterable[int], port: int) -> bool:
    """True when one of the processes listens on the port, on any address. Blocks for some milliseconds."""
    here = listening_inodes(port)
    return any(_listens(pid, port, here) for pid in pids)


def has_visible_listener(port: int) -> bool:
    """True when a process whose open files may be read listens on the port in our network namespace. Blocks for some
    hundredths of a second."""
    here = listening_inodes(port)
    return bool(here) and any(_listens(pid, port, here) for pid in psutil.pids())


def _listens(pid: int, port: int, here: Collection[int]) -> bool:
    """`here`: the sockets that listen on the port in our network namespace; without any, the process may be in another
    one."""
    with contextlib.suppress(OSError):  # it has exited, or may not be read
        sockets = {f"socket:[{inode}]" for inode in here or _listening_inodes_seen_by(pid, port)}
        if sockets:
            return any(_link(entry) in sockets for entry in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _listening_inodes_seen_by(pid: int, port: int) -> set[int]:
    """Those in the network namespace of a process. Not through psutil: it takes apart every connection of the host, 40
    ms where there are 2,000."""
    row = re.compile(_LISTENING % port, re.MULTILINE)
    tables = (Path(f"/proc/{pid}/net/{name}").read_bytes() for name in ("tcp", "tcp6"))
    return {int(inode) for table in tables for inode in row.findall(table)}


def _link(path: Path) -> str:
    with contextlib.suppress(OSError):  # closed meanwhile
        return str(path.readlink())
    return ""


def lingering_ports() -> frozenset[int]:
    """Ports of this host with closed connections that the kernel keeps for a minute (TIME_WAIT), although the engine
    that had them is gone. An engine can bind one, because it sets SO_REUSEADDR. Blocks for some milliseconds.

    Not through psutil: to list connections that no process has, it reads the open files of all processes, which takes
    16 times as long when there are 18,000 of them.
    """
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                _, local, _, state = line.split(maxsplit=4)[:4]
                if state == _TIME_WAIT:
                    found.add(int(local.rpartition(":")[2], 16))
    return frozenset(found)


def local_url(host: str, port: int) -> str:
    """Where this host reaches a server bound to `host`."""
    address = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
