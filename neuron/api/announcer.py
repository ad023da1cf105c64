"""Announces this neuron to the cortexes of `[cortex]`, again and again."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import socket
import ssl
from collections.abc import Callable, Collection, Sequence
from functools import partial
from urllib.parse import urlsplit

import aiohttp

from neuron.api.dialling import Dialler, Targets, shown
from neuron.config import NeuronConfig
from shared.protocol import Registration, RegistrationReply
from shared.tasks import keep_running, timeout
from shared.tls import TlsError, TlsFiles, client_context

log = logging.getLogger(__name__)

TIMEOUT_SECS = 5.0
_READ_BYTES = 4096


class Announcer:
    """Runs until cancelled. `port` is the one that neuron listens on; `engine_ports` gives those of its engines."""

    def __init__(
        self,
        config: NeuronConfig,
        http: aiohttp.ClientSession,
        *,
        port: int,
        instance_id: str,
        engine_ports: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._config = config
        self._settings = config.cortex
        self._http = http
        self._port = port
        self._instance_id = instance_id
        self._name = config.name or socket.gethostname()
        self._targets = Targets(config.host, port, engine_ports)

    async def run(self) -> None:
        """Each cortex by itself: one that does not answer must not delay the others."""
        loops = {f"announcements to {url}": partial(self._keep_announcing, url) for url in self._settings.urls}
        await asyncio.gather(*(keep_running(name, loop) for name, loop in loops.items()))

    async def _keep_announcing(self, url: str) -> None:
        """If neuron dials, it also keeps connections there."""
        if not self._settings.dials:
            await self._announce_again(url, lambda _: None)
            return
        dialler = Dialler(url, self._name, self._targets, self._context)
        async with dialler.running():
            await self._announce_again(url, dialler.use)

    async def _announce_again(self, url: str, accepted: Callable[[RegistrationReply], None]) -> None:
        problem: str | None = ""  # the last one; None: it was accepted
        while True:
            found = await self._announce(url, accepted)
            if found != problem:
                if found is None:
                    log.info("registered with cortex at %s", url)
                else:
                    log.warning("cannot register with cortex at %s: %s", url, found)
            problem = found
            await asyncio.sleep(self._settings.interval_secs * random.uniform(0.9, 1.0))  # noqa: S311 - spreads load

    async def _announce(self, url: str, accepted: Callable[[RegistrationReply], None]) -> str | None:
        """Why the cortex has not accepted it; None if it has."""
        try:
            async with timeout(TIMEOUT_SECS):
                token = await asyncio.to_thread(self._settings.token)
                endpoint = f"dial://{self._name}"
                if not self._settings.dials:
                    endpoint = await asyncio.to_thread(endpoint_for, self._config, self._port, url)
                tls = await asyncio.to_thread(self._context) if url.startswith("https:") else True
                wanted = Registration(
                    name=self._name,
                    endpoint=endpoint,
                    token=self._config.bearer_token,
                    instance_id=self._instance_id,
                    interval_secs=self._settings.interval_secs,
                )
                return await self._send(url, wanted, token, tls, accepted)
        except asyncio.TimeoutError:
            return f"no answer within {TIMEOUT_SECS:g} s"
        except (aiohttp.ClientError, OSError, TlsError, ValueError) as error:
            return str(error) or type(error).__name__

    async def _send(
        self,
        url: str,
        wanted: Registration,
        token: str,
        tls: ssl.SSLContext | bool,
        accepted: Callable[[RegistrationReply], None],
    ) -> str | None:
        request = self._http.post(
            f"{url}/fleet/register",
            json=wanted.model_dump(mode="json", exclude_none=True),
            headers={"Authorization": f"Bearer {token}"},
            allow_redirects=False,
            ssl=tls,
        )
        async with request as answer:
            body = await answer.content.read(_READ_BYTES)
            if answer.status != 200:
                return f"HTTP {answer.status}: {shown(body)}"
            accepted(RegistrationReply.model_validate_json(body))
            return None

    def _context(self) -> ssl.SSLContext:
        return client_context(TlsFiles(ca=self._settings.ca))


def endpoint_for(config: NeuronConfig, port: int, url: str) -> str:
    """Where the cortex at `url` reaches this neuron. Blocks.

    Raises:
        OSError: the system has no way there.
        ValueError: the cortex is on another host, and neuron listens on this host's loopback address only.
    """
    if config.cortex.endpoint is not None:
        return config.cortex.endpoint
    return endpoint_towards(config, port, *_route(url))


def endpoint_towards(config: NeuronConfig, port: int, here: str, there: str) -> str:
    """As `endpoint_for`, with the addresses of a connection from here to that cortex. Pure."""
    if _is_loopback(config.host) and not _is_loopback(here) and here != there:
        raise ValueError(
            f"it cannot reach host = {config.host!r} of neuron.toml: set host to an address of this host that it can "
            "reach, or [cortex] endpoint"
        )
    host = here if config.binds_all_addresses else config.host
    scheme = "http" if config.tls_files is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _route(url: str) -> tuple[str, str]:
    """The addresses of a connection to there. Nothing is sent: a datagram socket only chooses its route."""
    parts = urlsplit(url)
    found: Sequence[tuple[int, int, int, str, tuple[str | int, ...]]]
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)  # type: ignore[assignment]
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])
