"""Announces this neuron to the cortexes of `[cortex]`, again and again."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp

from neuron.config import NeuronConfig
from shared.protocol import Registration
from shared.tasks import timeout
from shared.tls import TlsError, TlsFiles, client_context

log = logging.getLogger(__name__)

TIMEOUT_SECS = 5.0
_SHOWN_CHARS = 500
"""Of an answer that is not an error of cortex."""


class Announcer:
    """Runs until cancelled. `port` is the one that neuron listens on."""

    def __init__(self, config: NeuronConfig, http: aiohttp.ClientSession, *, port: int, instance_id: str) -> None:
        self._config = config
        self._settings = config.cortex
        self._http = http
        self._port = port
        self._instance_id = instance_id

    async def run(self) -> None:
        """Each cortex by itself: one that does not answer must not delay the others."""
        await asyncio.gather(*(self._keep_announcing(url) for url in self._settings.urls))

    async def _keep_announcing(self, url: str) -> None:
        problem: str | None = ""  # the last one; None: it was accepted
        while True:
            found = await self._announce(url)
            if found != problem:
                if found is None:
                    log.info("registered with cortex at %s", url)
                else:
                    log.warning("cannot register with cortex at %s: %s", url, found)
            problem = found
            await asyncio.sleep(self._settings.interval_secs * random.uniform(0.9, 1.0))  # noqa: S311 - spreads load

    async def _announce(self, url: str) -> str | None:
        """Why the cortex has not accepted it; None if it has."""
        try:
            async with timeout(TIMEOUT_SECS):
                token = await asyncio.to_thread(self._settings.token)
                endpoint = await asyncio.to_thread(endpoint_for, self._config, self._port, url)
                tls = await asyncio.to_thread(self._context) if url.startswith("https:") else True
                wanted = Registration(
                    name=self._config.name or socket.gethostname(),
                    endpoint=endpoint,
                    token=self._config.bearer_token,
                    instance_id=self._instance_id,
                    interval_secs=self._settings.interval_secs,
                )
                return await self._send(url, wanted, token, tls)
        except asyncio.TimeoutError:
            return f"no answer within {TIMEOUT_SECS:g} s"
        except (aiohttp.ClientError, OSError, TlsError, ValueError) as error:
            return str(error) or type(error).__name__

    async def _send(self, url: str, wanted: Registration, token: str, tls: ssl.SSLContext | bool) -> str | None:
        request = self._http.post(
            f"{url}/fleet/register",
            json=wanted.model_dump(mode="json", exclude_none=True),
            headers={"Authorization": f"Bearer {token}"},
            allow_redirects=False,
            ssl=tls,
        )
        async with request as answer:
            if answer.status == 200:
                return None
            text = (await answer.content.read(_SHOWN_CHARS)).decode("utf-8", "replace")
            return f"HTTP {answer.status}: {text}"

    def _context(self) -> ssl.SSLContext:
        return client_context(TlsFiles(ca=self._settings.ca))


def endpoint_for(config: NeuronConfig, port: int, url: str) -> str:
    """Where the cortex at `url` reaches this neuron. Blocks. Raises OSError if the system has no way there."""
    if config.cortex.endpoint is not None:
        return config.cortex.endpoint
    host = _address_towards(url) if config.binds_all_addresses else config.host
    scheme = "http" if config.tls_files is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _address_towards(url: str) -> str:
    """This host's address of connections to there. Nothing is sent: a datagram socket only chooses its route."""
    parts = urlsplit(url)
    found: Sequence[tuple[int, int, int, str, tuple[str | int, ...]]]
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)  # type: ignore[assignment]
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
