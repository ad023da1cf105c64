"""Finds neurons by DNS: each address of a name is one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

from cortex.config.discovery import DiscoverySettings
from cortex.fleet.members.found import FoundNeurons
from cortex.fleet.members.roster import endpoint_of
from shared.tasks import timeout

TIMEOUT_SECS = 5.0
"""How long a look-up may take."""
_NO_ADDRESS = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host. Raises OSError; an unknown name is `[]`."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses that the system's resolver has for a host, in its order.

    Raises:
        OSError: it gives no answer.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _NO_ADDRESS:
            return []
        raise
    return [str(address[0]) for *_, address in found]


class DnsDiscovery:
    """Looks the name up from time to time."""

    def __init__(self, settings: DiscoverySettings, found: FoundNeurons, *, resolve: Resolve = resolve) -> None:
        self._settings = settings
        self._found = found
        self._resolve = resolve

    async def run(self) -> None:
        """Looks every `interval_secs`. Never returns."""
        while True:
            await asyncio.sleep(self._settings.interval_secs)
            await self.look()

    async def look(self) -> None:
        """One look-up."""
        await self._found.use(await self._endpoints())

    async def _endpoints(self) -> list[str] | None:
        """None without an answer of DNS."""
        settings = self._settings
        try:
            async with timeout(TIMEOUT_SECS):
                addresses = await self._resolve(settings.host or "", settings.port)
        except (OSError, ValueError, asyncio.TimeoutError) as error:  # ValueError: not a host name
            reason = str(error) or f"no answer within {TIMEOUT_SECS:g} s"
            self._found.warn("lookup", f"[discovery] host {settings.host!r} cannot be looked up: {reason}")
            return None
        empty = f"[discovery] host {settings.host!r} has no address: no neuron is found"
        self._found.warn("lookup", "" if addresses else empty)
        return [endpoint_of(address, settings.port, tls=settings.tls) for address in addresses]
