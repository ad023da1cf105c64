"""The sockets that `cortex serve` listens on, and how they outlive a restart under systemd."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from cortex.config.gateway import GatewaySettings, parse_listen
from shared.serve import ListenError, bind, detect_vanished_clients
from shared.system.service_manager import drop_sockets, keep_sockets, passed_sockets

KEPT = "cortex-clients"
"""The name under which systemd keeps the sockets of clients."""


def client_sockets(settings: GatewaySettings, given: socket.socket | None) -> list[socket.socket]:
    """A socket for each worker, all on one port: `given`, those of a .socket unit, those that the process before this
    one left with systemd, or new ones on `[gateway] listen`, which systemd then keeps.

    Raises:
        ListenError: the address is taken.
    """
    passed = passed_sockets()
    kept = passed.pop(KEPT, [])
    activated = next((socks[0] for socks in passed.values()), None)
    if activated is not None:
        detect_vanished_clients(activated)
    sock = activated if given is None else given
    if sock is not None:
        if kept:
            _close(kept)
            give_up_sockets()
        return [sock, *(sock.dup() for _ in range(settings.workers - 1))]
    if len(kept) == settings.workers and all(_is_on(each, settings) for each in kept):
        return kept
    _close(kept)
    socks = _bound(settings)
    keep_sockets(KEPT, socks)
    return socks


def give_up_sockets() -> None:
    """After this and once cortex has closed its sockets, clients are refused instead of waiting for the next cortex."""
    drop_sockets(KEPT)


def metrics_socket(settings: GatewaySettings, others: Sequence[socket.socket]) -> socket.socket:
    """Closes the other sockets if it fails.

    Raises:
        ListenError: the address is taken.
    """
    try:
        return bind(*parse_listen(settings.metrics_listen))
    except ListenError as error:
        for other in others:
            other.close()
        raise ListenError(f"{error} ([gateway] metrics_listen)") from error


def _close(kept: Sequence[socket.socket]) -> None:
    """Frees their port at once; systemd may hold them for a moment longer."""
    for each in kept:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def _is_on(sock: socket.socket, settings: GatewaySettings) -> bool:
    host, port = parse_listen(settings.listen)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False
    return bool(found[0][4][:2] == sock.getsockname()[:2])


def _bound(settings: GatewaySettings) -> list[socket.socket]:
    host, port = parse_listen(settings.listen)
    first = bind(host, port)
    if settings.workers == 1:
        return [first]
    # Binding the port alone proves that it is free; a shared bind would succeed next to another cortex.
    port = first.getsockname()[1]
    first.close()
    return [bind(host, port, shared=True) for _ in range(settings.workers)]
