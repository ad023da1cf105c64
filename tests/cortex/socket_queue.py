"""How much the other side has not read yet, for tests that must know when a segment was read.

Asked by netlink (sock_diag(7)): /proc/net/tcp says the same, but takes milliseconds to print.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator
from typing import Final

_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_NETLINK_SOCK_DIAG: Final = 4
_ALL_STATES: Final = 0xFFFFFFFF
_NO_COOKIE: Final = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2 up to its id
_ID = struct.Struct("!HH4s12x4s12x")  # inet_diag_sockid up to its interface
_RQUEUE_OFFSET: Final = _HEADER.size + 4 + 48 + 4

Address = tuple[str, int]


@contextlib.contextmanager
def _netlink() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(5)
        yield sock


def unread_bytes(reader: Address, writer: Address) -> int:
    """Bytes in the receive queue of the IPv4 socket with address `reader`, connected to `writer`; 0 when it is closed.

    Raises:
        OSError: the kernel does not tell.
    """
    identity = _ID.pack(reader[1], writer[1], socket.inet_aton(reader[0]), socket.inet_aton(writer[0]))
    body = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
    body += identity + struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
    with _netlink() as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        reply = sock.recv(65536)
    _, kind, *_ = _HEADER.unpack_from(reply)
    if kind == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", reply, _HEADER.size)
        if -code == errno.ENOENT:
            return 0
        raise OSError(-code, "sock_diag")
    return int(struct.unpack_from("=I", reply, _RQUEUE_OFFSET)[0])
