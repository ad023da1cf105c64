"""Detects peers that vanish without FIN or RST: a host without power, a pulled cable, a NAT entry that was dropped.

Without this a connection to such a peer stays open for hours, or for a quarter of an hour while data is outstanding.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple


class ProbeTimes(NamedTuple):
    """After `idle_secs` without a byte the kernel probes the peer, and gives up after `probes` unanswered ones that
    are `interval_secs` apart (tcp(7))."""

    idle_secs: int
    interval_secs: int
    probes: int

    @property
    def total_secs(self) -> int:
        """How long a silent connection to a vanished peer stays open."""
        return self.idle_secs + self.interval_secs * self.probes


SERVER_TIMES = ProbeTimes(10, 10, 3)
"""For connections to engines and neurons. The same total bounds unacknowledged data."""
CLIENT_TIMES = ProbeTimes(45, 15, 3)
"""For connections of clients: laptops that change networks come back with the same address."""
UNANSWERED_SECS = 90
"""How long a client's kernel may leave our data unacknowledged."""
UNANSWERED_CHECK_SECS = 5.0
"""How often to ask `is_unanswered`. Two answers in a row count: a probe may just have left."""

_INFO: Final = struct.Struct("=BBBB20xI28xI")
"""The start of struct tcp_info (linux/tcp.h): state, ca_state, retransmits, probes, then unacked and last_ack_recv."""


def detect_vanished_server(sock: socket.socket) -> None:
    """Makes the kernel end the connection with ETIMEDOUT after SERVER_TIMES. TCP_USER_TIMEOUT also ends it when the
    server stops reading for that long."""
    _probe(sock, SERVER_TIMES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SERVER_TIMES.total_secs * 1000)


def detect_vanished_clients(listening: socket.socket) -> None:
    """Makes the kernel end silent connections that are accepted from this socket after CLIENT_TIMES.

    Not TCP_USER_TIMEOUT: it would cut a client that is alive and stops reading for minutes. While data is outstanding
    the kernel sends no keep-alive probes, so `is_unanswered` must be asked as well.
    """
    _probe(listening, CLIENT_TIMES)


def is_unanswered(sock: socket.socket) -> bool:
    """True if the peer's kernel has acknowledged nothing for UNANSWERED_SECS although it was sent data or probed.

    The kernel of a client that does not read acknowledges each probe.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    _, _, _, probes, unacknowledged, last_ack_ms = _INFO.unpack(info)
    return bool(probes or unacknowledged) and int(last_ack_ms) > UNANSWERED_SECS * 1000


def _probe(sock: socket.socket, times: ProbeTimes) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, times.idle_secs)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, times.interval_secs)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, times.probes)
