"""The network between the neurons of an engine that spans several: this host's address in it, and checks before a load.

Before a load each neuron of the group listens on a port, and each connects to all others. On rank 0's neuron that port
is then the one where the engine's parts meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from neuron.config import GroupSettings
from neuron.engine.ports import PortPool
from neuron.harness.base import GroupNetwork
from shared.errors import Unavailable
from shared.protocol import ErrorCode, GroupPart, GroupPeer, ListenReply
from shared.retry_after import GROUP_UNREACHABLE_SECS
from shared.tasks import timeout

log = logging.getLogger(__name__)

LISTEN_SECS = 60.0
"""How long a neuron listens for the others, and how long it keeps a port for a group afterwards."""
REACH_SECS = 3.0
"""How long a peer may take to accept a connection and to say which group it listens for."""
_INTERFACES = Path("/sys/class/net")
_GREETING = "neuron group "
_MAX_GREETING_BYTES = 256
_FOREIGN = "another program answers there"


@dataclass
class _Listener:
    server: asyncio.Server
    port: int
    pool: PortPool
    timer: asyncio.TimerHandle


class GroupListeners:
    """Single owner of the ports that groups get on this host."""

    def __init__(self, settings: GroupSettings) -> None:
        self._settings = settings
        self._pools: dict[str, PortPool] = {}
        self._listeners: dict[str, _Listener] = {}

    async def listen(self, group: str, address: str) -> ListenReply:
        """Listens on a free port of this host until `close`, at most `LISTEN_SECS`. `address` counts if the
        configuration names none.

        Raises:
            Unavailable: no port is free, or this host does not have the address.
        """
        self.close(group)
        address = self._settings.address or address
        try:
            _check_own(address)
            pool = self._pools.setdefault(address, PortPool(address))
            port = pool.reserve(self._settings.port_range)
            try:
                server = await asyncio.start_server(lambda _, writer: _greet(writer, group), address, port)
            except OSError:
                pool.release(port)
                raise
        except OSError as error:
            raise _unavailable(f"cannot listen on {address} for a group: {error.strerror or error}") from error
        self.close(group)  # another caller may have begun to listen for it meanwhile
        timer = asyncio.get_running_loop().call_later(LISTEN_SECS, self.close, group)
        self._listeners[group] = _Listener(server, port, pool, timer)
        return ListenReply(address=address, port=port)

    def close(self, group: str) -> None:
        """Stops listening: the engine takes the port now. No other group gets it meanwhile."""
        listener = self._listeners.pop(group, None)
        if listener is not None:
            listener.timer.cancel()
            listener.server.close()
            asyncio.get_running_loop().call_later(LISTEN_SECS, listener.pool.release, listener.port)

    def close_all(self) -> None:
        for group in list(self._listeners):
            self.close(group)

    async def network_of(self, part: GroupPart) -> GroupNetwork:
        """This host's side of the group's network."""
        address = self._settings.address
        if address is None:
            address = await asyncio.to_thread(_address_towards, part)
        interface = self._settings.interface
        if interface is None:
            interface = await asyncio.to_thread(_interface_of, address)
        return GroupNetwork(address, interface, self._settings.env)


def _check_own(address: str) -> None:
    """Raises OSError: this host does not have the address, so every port would look taken."""
    family, *_, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(target)


async def unreachable(group: str, peers: list[GroupPeer]) -> dict[str, str]:
    """Why peers do not answer for the group, by node."""
    reasons = await asyncio.gather(*(_why_unreachable(group, peer) for peer in peers))
    return {peer.node: reason for peer, reason in zip(peers, reasons, strict=True) if reason is not None}


async def _greet(writer: asyncio.StreamWriter, group: str) -> None:
    with contextlib.suppress(OSError):
        writer.write(f"{_GREETING}{group}\n".encode())
        await writer.drain()
    writer.close()


async def _why_unreachable(group: str, peer: GroupPeer) -> str | None:
    try:
        async with timeout(REACH_SECS):
            reader, writer = await asyncio.open_connection(peer.address, peer.port, limit=_MAX_GREETING_BYTES)
            try:
                greeting = await reader.readline()
            finally:
                writer.close()
    except asyncio.TimeoutError:
        return f"no answer within {REACH_SECS:g} s"
    except OSError as error:
        # asyncio's own words for a refused connection only repeat the address.
        return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)
    except ValueError:  # a line longer than a greeting
        return _FOREIGN
    if greeting.strip() != f"{_GREETING}{group}".encode():
        return _FOREIGN
    return None


def _address_towards(part: GroupPart) -> str:
    """The address of this host that a connection to rank 0 would have. Sends nothing; may ask a name server."""
    if part.serves:
        return part.master_addr
    try:
        found = socket.getaddrinfo(part.master_addr, part.master_port, type=socket.SOCK_DGRAM)
        for family, kind, _, _, target in found:
            with socket.socket(family, kind) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
    except OSError as error:
        raise _unavailable(f"no route to {part.master_addr}: {error.strerror or error}") from error
    raise _unavailable(f"{part.master_addr} has no address")


def _unavailable(reason: str) -> Unavailable:
    return Unavailable(
        f"{reason}; see [group] in neuron.toml", code=ErrorCode.GROUP_UNREACHABLE, retry_after=GROUP_UNREACHABLE_SECS
    )


def link_mbps(settings: GroupSettings, address: str) -> int | None:
    """The speed of this host's link to the others of a group, in Mbit/s; None where the system does not say, as for the
    loopback, a wireless interface, or one that is down. `address` counts if the configuration names none."""
    interface = settings.interface or _interface_of(settings.address or address)
    if interface is None or "/" in interface:
        return None
    try:
        speed = int((_INTERFACES / interface / "speed").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None


def _interface_of(address: str) -> str | None:
    """The network interface with this address; for any address of the loopback, the loopback; None if there is
    none."""
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:  # a name
        return None
    for name, found in psutil.net_if_addrs().items():
        for each in found:
            with contextlib.suppress(ValueError):  # not an internet address
                own = ipaddress.ip_address(each.address.partition("%")[0])
                if own == wanted or (wanted.is_loopback and own.is_loopback and wanted.version == own.version):
                    return name
    return None
