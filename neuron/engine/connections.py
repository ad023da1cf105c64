"""What the kernel knows of the connections to an engine, for one that does not say how many requests it has.

The kernel tells who sent last on a connection, how long ago, and how many bytes, but not where a request or an answer
ends. An answer that is complete, on a connection that is kept open, looks the same as one that pauses; a request that
waits for its first token looks the same as one that its client never completed. What tells them apart is whether the
engine computes: that takes CPU time, also on a GPU. `is_busy` has the rule.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

QUIET_SECS = 5.0
"""An answer that has begun may pause this long while the engine computes nothing. Servers that close idle connections
do it after this time, so that those still open have a request."""
HEAD_BYTES = 256
"""An engine that has sent no more may have sent only the head of a streamed answer, before it reads the prompt."""
PAUSE_SECS = 30.0
"""An answer that has begun may pause this long while the engine computes, for example while it reads a streamed
request's prompt; and a request may be unanswered this long while the engine computes nothing."""

# sock_diag(7), linux/inet_diag.h, struct tcp_info of linux/tcp.h. The kernel answers every user.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3
_ESTABLISHED, _LISTEN = 1, 10
_TCP_INFO = 2
_HEADER = struct.Struct("=IHHII")
_QUERY = struct.Struct("=BBBBI")
_QUEUES = struct.Struct("=II")
_ATTRIBUTE = struct.Struct("=HH")
_IDS_AT, _QUEUES_AT, _INODE_AT, _ATTRIBUTES_AT = 4, 56, 68, 72
_LAST_SENT_AT, _LAST_RECEIVED_AT, _BYTES_RECEIVED_AT, _BYTES_SENT_AT = 44, 52, 128, 200
_RECEIVE_BYTES = 1 << 16
_MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address in an IPv6 one


@dataclass(frozen=True)
class ConnectionTraffic:
    """An established connection, seen from the engine's side. Ages are seconds."""

    bytes_received: int
    bytes_sent: int
    last_received_age: float
    last_sent_age: float
    queued: int
    """Bytes that the engine has not read, or that the client has not acknowledged."""


@dataclass(frozen=True)
class _Socket:
    state: int
    local: tuple[bytes, int]
    remote: tuple[bytes, int]
    inode: int
    traffic: ConnectionTraffic | None


def is_busy(connection: ConnectionTraffic, *, idle_secs: float = 0.0) -> bool:
    """True when a request may be under way. `idle_secs` is how long the engine has computed nothing, 0 if unknown.

    A client that has sent nothing has no request. If the client sent last, or bytes are queued, the engine owes it an
    answer: however long that takes while the engine computes, else for PAUSE_SECS without traffic. If the engine sent
    last, the answer is complete or pauses: it counts as complete after PAUSE_SECS without traffic, and after QUIET_SECS
    in which the engine computed nothing either, unless so far it may have sent no more than a head.
    """
    if not connection.bytes_received and not connection.queued:
        return False
    silent_secs = connection.last_received_age
    if connection.bytes_sent:
        silent_secs = min(silent_secs, connection.last_sent_age)
    both_secs = min(silent_secs, idle_secs)
    answers = connection.bytes_sent and connection.last_received_age >= connection.last_sent_age
    if connection.queued or not answers:
        return both_secs < PAUSE_SECS
    return silent_secs < PAUSE_SECS and (both_secs < QUIET_SECS or connection.bytes_sent <= HEAD_BYTES)


def connections_to(port: int) -> list[ConnectionTraffic] | None:
    """The established connections to the engine that listens on `port`, without those of this process.

    None when the kernel does not tell, or nothing listens there in this network namespace. Blocks for some
    milliseconds.
    """
    try:
        served = list(_sockets(source_port=port))
        clients = list(_sockets(destination_port=port))
        inodes = _own_inodes() if clients else set()
    except OSError:
        return None
    if not any(each.state == _LISTEN for each in served):
        return None
    own = {each.local for each in clients if each.inode in inodes}
    return [each.traffic for each in served if each.traffic is not None and each.remote not in own]


def listening_inodes(port: int) -> set[int]:
    """The sockets that listen on `port` in this network namespace; empty when the kernel does not tell. 50 times faster
    than /proc/net/tcp, which walks through all connections of the host."""
    try:
        return {each.inode for each in _sockets(source_port=port, states=(_LISTEN,))}
    except OSError:
        return set()


def _own_inodes() -> set[int]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = str(entry.readlink())
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found


def _sockets(
    *, source_port: int = 0, destination_port: int = 0, states: Sequence[int] = (_ESTABLISHED, _LISTEN)
) -> Iterator[_Socket]:
    """The TCP sockets with these ports and states. Raises OSError when the kernel does not tell."""
    wanted = sum(1 << state for state in states)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1)
        for family in (socket.AF_INET, socket.AF_INET6):
            query = _QUERY.pack(family, socket.IPPROTO_TCP, 1 << (_TCP_INFO - 1), 0, wanted)
            query += struct.pack(">HH", source_port, destination_port) + bytes(36) + b"\xff" * 8
            netlink.send(_HEADER.pack(_HEADER.size + len(query), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + query)
            yield from _answers(netlink)


def _answers(netlink: socket.socket) -> Iterator[_Socket]:
    while True:
        data = netlink.recv(_RECEIVE_BYTES)
        offset = 0
        while offset < len(data):
            length, kind, *_ = _HEADER.unpack_from(data, offset)
            body = data[offset + _HEADER.size : offset + length]
            if kind == _DONE:
                return
            if kind == _ERROR:
                code = -struct.unpack_from("=i", body)[0]
                raise OSError(code, os.strerror(code))
            yield _socket(body)
            offset += _aligned(length)


def _socket(body: bytes) -> _Socket:
    """From an inet_diag_msg and its attributes."""
    source_port, destination_port = struct.unpack_from(">HH", body, _IDS_AT)
    source, destination = body[8:24], body[24:40]
    state = body[1]
    return _Socket(
        state=state,
        local=(_address(body[0], source), source_port),
        remote=(_address(body[0], destination), destination_port),
        inode=struct.unpack_from("=I", body, _INODE_AT)[0],
        traffic=_traffic(body) if state == _ESTABLISHED else None,
    )


def _address(family: int, raw: bytes) -> bytes:
    if family == socket.AF_INET:
        return raw[:4]
    return raw[12:] if raw.startswith(_MAPPED) else raw


def _traffic(body: bytes) -> ConnectionTraffic:
    """Raises OSError when the kernel leaves out what `is_busy` needs (before Linux 4.19)."""
    offset = _ATTRIBUTES_AT
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        info = body[offset + _ATTRIBUTE.size : offset + length]
        if kind == _TCP_INFO and len(info) >= _BYTES_SENT_AT + 8:
            return ConnectionTraffic(
                bytes_received=struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)[0],
                bytes_sent=struct.unpack_from("=Q", info, _BYTES_SENT_AT)[0],
                last_received_age=struct.unpack_from("=I", info, _LAST_RECEIVED_AT)[0] / 1000,
                last_sent_age=struct.unpack_from("=I", info, _LAST_SENT_AT)[0] / 1000,
                queued=sum(_QUEUES.unpack_from(body, _QUEUES_AT)),
            )
        offset += max(_aligned(length), _ATTRIBUTE.size)
    raise OSError("the kernel tells nothing of its connections' traffic")


def _aligned(length: int) -> int:
    return (length + 3) & ~3
