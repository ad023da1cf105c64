"""What cortex asks of one neuron, with the failures sorted: out of reach, or refused with a reason."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from cortex.config import NeuronEntry
from cortex.proxy.pool import parse_url
from shared.protocol import (
    DeviceFigures,
    Discovery,
    EndpointReply,
    LoadCommand,
    ModelStatus,
    ModelView,
    NeuronHealth,
    SleepCommand,
    UnloadCommand,
)

CONNECT_TIMEOUT_SECS = 5.0
ENDPOINT_TIMEOUT_SECS = 5.0
EVENT_SILENCE_SECS = 60.0
"""A neuron sends a comment every 15 s on `/events`: silence of four times that is a dead connection."""
MAX_EVENT_LINE = 1 << 20

_MODELS = TypeAdapter(list[ModelView])
_FIGURES = TypeAdapter(list[DeviceFigures])
Model = TypeVar("Model", bound=BaseModel)


class NeuronUnreachable(Exception):
    """No answer: refused, reset, timed out, or not HTTP."""


class NeuronLeft(Exception):
    """The neuron has left the configuration while it was asked; it goes on with what it was asked for."""


class NeuronRefused(Exception):
    """An answer that is an error, or not the protocol's; `status` is its HTTP status.

    `cause` is whose doing a failed load is, a word of `shared.protocol.FailureCause`, and `devices` are the figures of
    the devices that had no room for it: None and empty where the neuron does not say, as those of the seed never do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        cause: str | None = None,
        devices: Sequence[DeviceFigures] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.cause = cause
        self.devices = tuple(devices)


class NeuronClient:
    """Typed calls to one neuron. Deadlines are the caller's, but for connecting."""

    def __init__(self, entry: NeuronEntry, session: aiohttp.ClientSession) -> None:
        self.name = entry.name
        self._base = entry.endpoint
        self._session = session
        self._loads: set[asyncio.Task[Any]] = set()
        token = entry.bearer_token
        # The session hands bodies on as they are, for the proxy's sake: here they must not be compressed.
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    async def discovery(self) -> Discovery:
        return await self._get("/discovery", Discovery)

    async def health(self) -> NeuronHealth:
        return await self._get("/health", NeuronHealth)

    async def models(self) -> list[ModelView]:
        data = await self._call("GET", "/models")
        try:
            return _MODELS.validate_python(data)
        except ValidationError as error:
            raise NeuronRefused(200, f"{self.name}: /models is not the protocol's: {_first(error)}") from error

    async def load(self, command: LoadCommand, *, timeout_secs: float, wait: bool = True) -> bool:
        """Returns when the model is loaded, with True; with `wait` False, from a neuron that knows of that, as soon as
        the load is under way and its memory booked, with False.

        Raises:
            NeuronRefused: the neuron says why it is not.
            NeuronUnreachable: no answer within `timeout_secs`.
            NeuronLeft: `leave` was called meanwhile.
        """
        path = "/models/load" if wait else "/models/load?wait=false"
        call = asyncio.create_task(self._post(path, command, timeout_secs), name=f"load on {self.name}")
        self._loads.add(call)
        try:
            await asyncio.wait([call])
            if call.cancelled():
                raise NeuronLeft(self.name)
            answer = await call
        except NeuronRefused as refused:
            # Seed neurons answer 400, ours 409, to a load of what they have already: for us that is success.
            if refused.status not in (400, 409) or "already loaded" not in refused.message.lower():
                raise
            return True
        finally:
            self._loads.discard(call)
            call.cancel()
        return not (isinstance(answer, dict) and answer.get("status") == ModelStatus.LOADING.value)

    def leave(self) -> None:
        """The neuron has left the configuration: nobody waits for its loads any more. It carries them on."""
        for call in self._loads:
            call.cancel()

    async def unload(self, model_id: str, *, timeout_secs: float, drain_secs: float = 0) -> None:
        """Returns when the model's process is gone. A neuron of ours lets it finish what others have sent it, for at
        most `drain_secs`. Raises as `load`."""
        path = f"/models/unload?drain_secs={drain_secs:g}" if drain_secs else "/models/unload"
        await self._post(path, UnloadCommand(model_id=model_id), timeout_secs)

    async def sleep(self, model_id: str, *, timeout_secs: float) -> None:
        """Returns when the model sleeps. Raises as `load`; NeuronRefused also from a neuron that knows no sleep."""
        await self._post("/models/sleep", SleepCommand(model_id=model_id), timeout_secs)

    async def endpoint(self, model_id: str) -> EndpointReply:
        """The engine's base URL as seen from here: a loopback host is replaced by the neuron's own."""
        path = f"/models/{quote(model_id, safe='')}/endpoint"
        found = await self._get(path, EndpointReply, timeout_secs=ENDPOINT_TIMEOUT_SECS)
        try:
            url = reachable_url(found.url, self._base)
            parse_url(url)  # here, and not when a request is waiting
            return found.model_copy(update={"url": url})
        except ValueError as error:
            raise NeuronRefused(200, f"{self.name}: endpoint of {model_id!r}: {error}") from error

    async def events(self) -> AsyncGenerator[tuple[str, Any], None]:
        """(event name, data) as they happen, until the connection ends.

        Raises:
            NeuronRefused: with 404 when this neuron has no events.
            NeuronUnreachable: the connection failed.
        """
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_SECS, sock_read=EVENT_SILENCE_SECS)
        headers = {**self._headers, "Accept": "text/event-stream"}
        try:
            async with self._session.get(f"{self._base}/events", headers=headers, timeout=timeout) as response:
                if response.status != 200 or response.content_type != "text/event-stream":
                    raise NeuronRefused(response.status, f"{self.name}: no event stream")
                async for event in _server_sent_events(response.content):
                    yield event
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            raise NeuronUnreachable(f"{self.name}: events: {_reason(error)}") from error

    async def _get(self, path: str, model: type[Model], *, timeout_secs: float | None = None) -> Model:
        data = await self._call("GET", path, timeout_secs=timeout_secs)
        try:
            return model.model_validate(data)
        except ValidationError as error:
            raise NeuronRefused(200, f"{self.name}: {path} is not the protocol's: {_first(error)}") from error

    async def _post(self, path: str, body: BaseModel, timeout_secs: float) -> Any:
        # What is asked of the neuron's memory is the model's id and nothing else.
        bare = isinstance(body, LoadCommand) and body.bare
        data = body.model_dump(mode="json", exclude_defaults=bare)
        return await self._call("POST", path, json_body=data, timeout_secs=timeout_secs)

    async def _call(self, method: str, path: str, *, json_body: Any = None, timeout_secs: float | None = None) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_secs, sock_connect=CONNECT_TIMEOUT_SECS)
        try:
            async with self._session.request(
                method, self._base + path, json=json_body, headers=self._headers, timeout=timeout
            ) as response:
                text = await response.text(errors="replace")
                if response.status >= 400:
                    raise _refusal(response.status, text, f"{self.name}: {method} {path}")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise NeuronUnreachable(f"{self.name}: {method} {path}: {_reason(error)}") from error
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise NeuronRefused(response.status, f"{self.name}: {method} {path}: not JSON") from error


def reachable_url(url: str, neuron_url: str) -> str:
    """An engine's URL with a loopback or wildcard host replaced by the neuron's, unless that is loopback too.

    Raises:
        ValueError: `url` is no absolute http URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an absolute URL")
    neuron_host = urlsplit(neuron_url).hostname or ""
    if not _is_local(parts.hostname) or _reaches_itself(neuron_host, parts.hostname):
        return url.rstrip("/")
    host = f"[{neuron_host}]" if ":" in neuron_host else neuron_host
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, netloc, parts.path, "", "")).rstrip("/")


def _reaches_itself(neuron_host: str, engine_host: str) -> bool:
    """True when the neuron is on this very host by a name or another family of addresses: then the engine's own
    loopback address is as good, and the neuron's may be one that the engine does not listen on."""
    if not _is_local(neuron_host) or _is_wildcard(engine_host):
        return False
    try:
        return ipaddress.ip_address(neuron_host).version != ipaddress.ip_address(engine_host).version
    except ValueError:
        return neuron_host == "localhost"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refusal(status: int, text: str, context: str) -> NeuronRefused:
    """Understands our envelope, a flat `{"error": "text"}`, and anything else as text."""
    try:
        error = json.loads(text).get("error")
    except (ValueError, AttributeError):
        error = None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        code, cause = error.get("code"), error.get("cause")
        return NeuronRefused(
            status,
            error["message"],
            code if isinstance(code, str) else None,
            cause=cause if isinstance(cause, str) else None,
            devices=_figures(error.get("devices")),
        )
    if isinstance(error, str):
        return NeuronRefused(status, error)
    return NeuronRefused(status, f"{context}: HTTP {status}: {text[:500]}")


def _figures(data: Any) -> list[DeviceFigures]:
    try:
        return _FIGURES.validate_python([] if data is None else data)
    except ValidationError:
        return []


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    return str(error) or type(error).__name__


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


async def _server_sent_events(stream: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """(event name, JSON data) of an SSE stream; comments, ids and events that are not JSON are passed over."""
    name, data, pending = "message", "", b""
    async for block in stream.iter_any():
        *lines, pending = (pending + block).split(b"\n")
        if len(pending) > MAX_EVENT_LINE:
            raise ValueError("a line of the event stream is too long")
        for raw in lines:
            line = raw.decode("utf-8", "replace").rstrip("\r")
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data += line[5:].strip()
            elif not line:
                if data:
                    with_json = _parsed(data)
                    if with_json is not None:
                        yield name, with_json
                name, data = "message", ""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
