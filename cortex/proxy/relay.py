"""One request to one engine: what goes up, what comes down, and what happens when either side is lost."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from cortex.proxy.headers import request_headers, response_headers
from cortex.proxy.usage import Usage, UsageTail
from shared.errors import UpstreamError
from shared.http import is_anthropic
from shared.protocol import EndpointReply

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECS = 5.0
LARGE_BODY_BYTES = 1 << 19
# An engine answers when it is done: nothing but connecting has a deadline. aiohttp's default total of 300 s would cut
# long answers.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_SECS)
_OWN_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class EngineUnreachable(Exception):
    """The engine gave no answer at all, so the request may go elsewhere."""


@dataclass
class Outcome:
    """What became of a request; filled while it runs. Times are monotonic seconds."""

    status: int = 0
    first_byte_at: float | None = None
    sent_bytes: int = 0
    usage: Usage | None = None
    lost: str | None = field(default=None)  # why the engine was lost after the first byte


@dataclass(frozen=True)
class Relay:
    """Everything that one attempt needs."""

    session: aiohttp.ClientSession
    request: web.Request
    body: bytes
    request_id: str
    node: str
    cold: bool

    async def send(self, endpoint: EndpointReply, outcome: Outcome) -> web.StreamResponse:
        """Forwards the request and streams the answer back.

        Raises:
            EngineUnreachable: before the first byte; nothing has been sent to the client.
        """
        try:
            upstream = await self._ask(endpoint)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise EngineUnreachable(str(error) or type(error).__name__) from error
        try:
            return await self._pass_on(upstream, outcome)
        finally:
            # Closed, not released: with the answer complete the connection has already gone back to the pool; without,
            # closing is what tells the engine to stop generating.
            upstream.close()

    async def _ask(self, endpoint: EndpointReply) -> aiohttp.ClientResponse:
        path = self.request.raw_path  # as it came; a request line may also hold a whole URL
        path = path if path.startswith("/") else self.request.rel_url.raw_path_qs
        url = URL(endpoint.url + path, encoded=True)
        headers = request_headers(
            self.request.headers, api_key=endpoint.api_key, request_id=self.request_id, peer=self.request.remote
        )
        try:
            return await self._post(url, headers)
        except (aiohttp.ServerDisconnectedError, ConnectionResetError):
            # A pooled connection that the engine closed at this very moment. Nothing was answered: once more.
            return await self._post(url, headers)

    async def _post(self, url: URL, headers: CIMultiDict[str]) -> aiohttp.ClientResponse:
        return await self.session.post(
            url,
            headers=headers,
            # Large bodies in pieces, so that writing one does not hold up everybody else.
            data=self.body if len(self.body) < LARGE_BODY_BYTES else io.BytesIO(self.body),
            skip_auto_headers=_OWN_HEADERS,
            timeout=_TIMEOUT,
            allow_redirects=False,
        )

    async def _pass_on(self, upstream: aiohttp.ClientResponse, outcome: Outcome) -> web.StreamResponse:
        outcome.status = upstream.status
        outcome.first_byte_at = time.monotonic()
        response = web.StreamResponse(
            status=upstream.status,
            reason=upstream.reason,
            headers=response_headers(upstream.headers, node=self.node, cold=self.cold, request_id=self.request_id),
        )
        await response.prepare(self.request)
        tail = UsageTail()
        try:
            async for chunk in upstream.content.iter_any():
                tail.feed(chunk)
                outcome.sent_bytes += len(chunk)
                await response.write(chunk)
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, OSError) as error:
            if self._client_is_gone():
                raise
            outcome.lost = str(error) or type(error).__name__
            return await self._tell_of_loss(response, outcome.lost)
        outcome.usage = tail.usage()
        await response.write_eof()
        return response

    def _client_is_gone(self) -> bool:
        transport = self.request.transport
        return transport is None or transport.is_closing()

    async def _tell_of_loss(self, response: web.StreamResponse, reason: str) -> web.StreamResponse:
        """Never a clean end: an SSE client gets an explicit last event, every other one a cut connection."""
        error = UpstreamError(f"the engine was lost while it answered: {reason}", code="upstream_lost")
        events = response.content_type == "text/event-stream"
        if events and response.content_length is None and "Content-Encoding" not in response.headers:
            # The blank line first ends an event that was cut in the middle.
            if is_anthropic(self.request):
                event = f"\n\nevent: error\ndata: {json.dumps(error.anthropic_body())}\n\n"
            else:
                event = f"\n\ndata: {json.dumps(error.body())}\n\n"
            await response.write(event.encode())
            await response.write_eof()
            return response
        if self.request.transport is not None:
            self.request.transport.abort()
        return response
