"""Finds neurons by DNS: each address of a name is one."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

from cortex.config.discovery import DiscoverySettings
from cortex.config.neurons import NODE_NAME_RULE, NeuronEntry, is_node_name
from cortex.fleet.members.membership import Membership
from cortex.fleet.members.roster import Addresses, after_answers, after_lookup, name_of, named, to_ask
from cortex.fleet.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.fleet.state import Fleet
from cortex.upstream.pool import EnginePool
from shared.protocol import Discovery
from shared.tasks import timeout

log = logging.getLogger(__name__)

TIMEOUT_SECS = 5.0
"""How long a look-up, and a neuron that is asked for its name, may take."""
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
    """Looks the name up from time to time, asks new neurons for their names and tells the membership."""

    def __init__(
        self,
        settings: DiscoverySettings,
        membership: Membership,
        fleet: Fleet,
        pool: EnginePool,
        *,
        resolve: Resolve = resolve,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._membership = membership
        self._fleet = fleet
        self._pool = pool
        self._resolve = resolve
        self._clock = clock
        self._known: Addresses = {}
        self._said: dict[str, str] = {}  # the last warning about each subject

    async def run(self) -> None:
        """Looks every `interval_secs`. Never returns."""
        while True:
            await asyncio.sleep(self._settings.interval_secs)
            await self.look()

    async def look(self) -> None:
        """One look-up."""
        endpoints = await self._endpoints()
        known = after_lookup(self._known, endpoints, now=self._clock(), grace_secs=self._settings.grace_secs)
        asked = to_ask(known, self._fleet.snapshot().nodes)
        answers = await asyncio.gather(*(self._ask(endpoint) for endpoint in asked))
        said = {endpoint: answer for endpoint, answer in zip(asked, answers, strict=True) if answer is not None}
        self._known = after_answers(known, said)
        found, clashes = named(self._known)
        self._warn("clashes", "; ".join(clashes))
        current = {"lookup", "clashes", *self._known}
        self._said = {subject: text for subject, text in self._said.items() if subject in current}
        self._membership.use_found(self._entry(address.endpoint, address.name) for address in found)

    def _entry(self, endpoint: str, name: str | None) -> NeuronEntry:
        known = name or name_of(Discovery(), endpoint)
        return NeuronEntry(name=known, endpoint=endpoint, token=self._settings.bearer_token)

    async def _endpoints(self) -> list[str] | None:
        """None without an answer of DNS."""
        settings = self._settings
        try:
            async with timeout(TIMEOUT_SECS):
                addresses = await self._resolve(settings.host or "", settings.port)
        except (OSError, ValueError, asyncio.TimeoutError) as error:  # ValueError: not a host name
            reason = str(error) or f"no answer within {TIMEOUT_SECS:g} s"
            self._warn("lookup", f"[discovery] host {settings.host!r} cannot be looked up: {reason}")
            return None
        empty = f"[discovery] host {settings.host!r} has no address: no neuron is found"
        self._warn("lookup", "" if addresses else empty)
        scheme = "https" if settings.tls else "http"
        hosts = (f"[{address}]" if ":" in address else address for address in addresses)
        return [f"{scheme}://{host}:{settings.port}" for host in hosts]

    async def _ask(self, endpoint: str) -> Discovery | None:
        """What the neuron there says about itself; None without an answer, and it is asked again next time."""
        client = NeuronClient(self._entry(endpoint, None), self._pool)
        try:
            async with timeout(TIMEOUT_SECS):
                answer = await client.discovery()
        except (NeuronUnreachable, NeuronRefused) as error:
            reason = error.reason
        except asyncio.TimeoutError:
            reason = f"no answer within {TIMEOUT_SECS:g} s"
        else:
            self._warn(endpoint, _unusable_name(answer, endpoint))
            return answer
        self._warn(endpoint, f"the neuron found at {endpoint} cannot be used yet: {reason}")
        return None

    def _warn(self, subject: str, text: str) -> None:
        """Once for each text, until the subject has another; "": all is well."""
        if not text:
            self._said.pop(subject, None)
        elif self._said.get(subject) != text:
            log.warning("%s", text)
            self._said[subject] = text


def _unusable_name(answer: Discovery, endpoint: str) -> str:
    """A warning about the name that the neuron gives itself; "" if it can be used."""
    if not answer.name or is_node_name(answer.name):
        return ""
    return (
        f"the neuron found at {endpoint} is called {name_of(answer, endpoint)!r} here, because its own name "
        f"{answer.name!r} cannot be used: {NODE_NAME_RULE}; change name in its neuron.toml"
    )
