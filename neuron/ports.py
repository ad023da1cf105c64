"""Ports for engines: chosen, verified, and nobody else's until released."""

from __future__ import annotations

import random
import socket

from shared.errors import Unavailable


class PortPool:
    """Hands out ports of this host. All harnesses share one pool, since their ranges may overlap.

    `host` is looked up once, here. Raises OSError when it has no address.
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

    def reserve(self, ports: tuple[int, int]) -> int:
        """A port of the range [first, last] that nothing on this host uses; ours until `release`.

        Starts at random and goes round: several neurons of one host rarely meet, and a port that was just given up is
        the last to be taken again.

        Raises:
            Unavailable: every port of the range is taken.
        """
        first, last = ports
        size = last - first + 1
        start = self._next.get(ports, random.randrange(size))  # noqa: S311 - spreads, protects nothing
        for step in range(size):
            port = first + (start + step) % size
            if port not in self._reserved and self._is_free(port):
                self._reserved.add(port)
                self._next[ports] = (start + step + 1) % size
                return port
        raise Unavailable(f"no free port in {first}-{last} on {self._host}", code="no_free_port", retry_after=10)

    def claim(self, port: int) -> None:
        """Reserves the port of an engine that has it already."""
        self._reserved.add(port)

    def release(self, port: int) -> None:
        self._reserved.discard(port)

    def _is_free(self, port: int) -> bool:
        """True when the port can be bound. Without SO_REUSEADDR, which would share it with an engine that has bound
        it but does not listen yet, as vLLM does while it loads."""
        with socket.socket(self._family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((self._address, port))
            except OSError:
                return False
        return True
