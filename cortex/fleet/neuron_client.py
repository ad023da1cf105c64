"""Calls to one neuron. A failed call means either unreachable, or refused with a reason."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from pydantic import BaseModel, ValidationError

from cortex.config.neurons import NeuronEntry
from cortex.fleet.answer_reader import AnswerReader, KnownHealth
from cortex.fleet.engine_url import reachable
from cortex.fleet.neuron_http import AnswerTooLarge, NeuronAnswer, NoEventStream, OnEvent, fetch, follow, follow_lines
from cortex.upstream.address import parse_url
from cortex.upstream.pool import EnginePool, NoConnection
from shared.protocol import (
    ENGINE_KEYS_HEADER,
    AdapterCommand,
    DeviceFigures,
    Discovery,
    EndpointReply,
    LeaseCommand,
    LeaseReply,
    ListenReply,
    LoadCommand,
    LoadReply,
    LogsReply,
    ModelStatus,
    ModelView,
    NeuronHealth,
    ReachCommand,
    ReachReply,
    SleepCommand,
    UnloadCommand,
    first_problem,
    read_answer,
)
from shared.request_ids import current_request_id
from shared.tasks import timeout

ENDPOINT_TIMEOUT_SECS = 5.0
GROUP_TIMEOUT_SECS = 10.0
LOGS_TIMEOUT_SECS = 10.0
EVENT_SILENCE_SECS = 30.0
"""A neuron sends a comment every 15 s on `/events`: after two to four times that without data, the connection is
dead."""
IDLE_SECS = 30.0
"""How long a connection to a neuron is kept between two polls."""

_WHERE = "token or token_env in cortex.toml ([[neurons]] or [discovery])"
NO_CREDENTIALS = f"it needs a token: set {_WHERE} to that of neuron.toml"
WRONG_CREDENTIALS = f"it refuses the token: {_WHERE} differs from that of neuron.toml"

Wanted = TypeVar("Wanted")


class NeuronUnreachable(Exception):
    """No answer: refused, reset, timed out, or not HTTP. `reason` is the message without the neuron and the request."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


class CommandAbandoned(Exception):
    """The neuron was removed from the configuration during the call. It still carries out the command."""


class NeuronRefused(Exception):
    """An error response, or one that breaks the protocol; `status` is its HTTP status.

    `reason` is the message without the neuron and the request. `cause` says what made a load fail, as in
    `shared.protocol.FailureCause`; `permanent`: it would fail there again; `devices` are the devices that lacked
    memory. They are None, False and empty if the neuron does not say; protocol v1 neurons never do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        reason: str | None = None,
        cause: str | None = None,
        permanent: bool = False,
        devices: Sequence[DeviceFigures] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = message if reason is None else reason
        self.code = code
        self.cause = cause
        self.permanent = permanent
        self.devices = tuple(devices)


class NeuronClient:
    """Typed calls to one neuron. Callers set the deadlines, except the one for connecting."""

    def __init__(self, entry: NeuronEntry, pool: EnginePool) -> None:
        self.name = entry.name
        self.answers = AnswerReader(entry.name)
        self._base = entry.endpoint
        self._commands: set[asyncio.Task[Any]] = set()
        self._pool = pool
        self._address, self._prefix = parse_url(entry.endpoint)
        sends_keys = ENGINE_KEYS_HEADER.encode() + b": 1"
        headers = [b"host: " + self._address.authority, b"accept-encoding: identity", sends_keys]
        if entry.bearer_token is not None:
            headers.append(b"authorization: Bearer " + _header_value(entry.bearer_token))
        self._headers = b"\r\n".join(headers)
        self._ask_health, self._ask_models = self._head("GET", "/health"), self._head("GET", "/models")
        self._health: KnownHealth | None = None
        self._models: tuple[bytes, tuple[ModelView, ...]] | None = None

    async def discovery(self) -> Discovery:
        return self._valid("/discovery", Discovery, await self._call("GET", "/discovery"))

    async def health(self) -> NeuronHealth:
        """Returns the previous object if only the uptime has changed."""
        body = (await self._answer("GET", "/health", self._ask_health, b"")).body
        known = self._health
        if known is not None and known.is_like(body):
            return known.health
        data = self._json("GET", "/health", body)
        # Entries parsed before do not show which of their fields were left out.
        reusable = None if self.answers.ignores_fields_of("/health") else known
        health = self._valid("/health", NeuronHealth, data if reusable is None else reusable.reused_in(data))
        self._health = KnownHealth.of(body, data, health)
        return health

    async def models(self) -> Sequence[ModelView]:
        """Returns the previous object if nothing has changed."""
        body = (await self._answer("GET", "/models", self._ask_models, b"")).body
        if self._models is None or self._models[0] != body:
            data = self._json("GET", "/models", body)
            if data is None and body:  # null, as some write an empty list
                data = []
            self._models = body, tuple(self._valid("/models", list[ModelView], data))
        return self._models[1]

    async def load(self, command: LoadCommand, *, timeout_secs: float, wait: bool = True) -> LoadReply:
        """Returns when the model is loaded. With `wait` False, and a neuron that supports it: as soon as the load has
        started and its memory is booked; the reply's status is then `loading`.

        Raises:
            NeuronRefused: the neuron says why it cannot load it.
            NeuronUnreachable: no answer within `timeout_secs`.
            CommandAbandoned: `abandon_commands` was called in the meantime.
        """
        path = "/models/load" if wait else "/models/load?wait=false"
        try:
            answer = await self._command(path, command, timeout_secs)
        except NeuronRefused as refused:
            # Already loaded counts as success, except for a part: that is of another group then. Protocol v1 neurons
            # report it with 400, ours with 409.
            there = refused.status in (400, 409) and "already loaded" in refused.message.lower()
            if not there or command.group is not None:
                raise
            return LoadReply(status=ModelStatus.LOADED.value)
        try:
            return self.answers.read("/models/load", LoadReply, answer)
        except ValidationError:  # a protocol v1 neuron may answer 200 with anything
            return LoadReply(status=ModelStatus.LOADED.value)

    def abandon_commands(self) -> None:
        """For a neuron that was removed from the configuration: stops waiting for its commands, which it still carries
        out."""
        for call in self._commands:
            call.cancel()

    async def unload(self, model_id: str, instance: str, *, timeout_secs: float, drain_secs: float = 0) -> None:
        """Returns when the engine's process is gone. Our neurons let it finish other clients' requests first, for at
        most `drain_secs`. Raises as `load`."""
        path = f"/models/unload?drain_secs={drain_secs:g}" if drain_secs else "/models/unload"
        await self._command(path, UnloadCommand(model_id=model_id, instance=instance or None), timeout_secs)

    async def sleep(self, model_id: str, instance: str, *, timeout_secs: float) -> None:
        """Returns when the engine sleeps. Raises as `load`; NeuronRefused also if the neuron does not support sleep."""
        await self._command("/models/sleep", SleepCommand(model_id=model_id, instance=instance or None), timeout_secs)

    async def load_adapter(self, command: AdapterCommand, *, timeout_secs: float) -> None:
        """Returns when the engine serves the LoRA adapter. Raises as `load`."""
        await self._command("/adapters/load", command, timeout_secs)

    async def unload_adapter(self, command: AdapterCommand, *, timeout_secs: float) -> None:
        """Returns when the engine takes no requests for the LoRA adapter. Raises as `load`."""
        await self._command("/adapters/unload", command, timeout_secs)

    async def listen_for_group(self, group: str) -> ListenReply:
        """Has the neuron listen for the other neurons of the group. Raises as `load`."""
        path = "/groups/listen"
        answer = await self._call("POST", path, json_body={"group": group}, timeout_secs=GROUP_TIMEOUT_SECS)
        return self._valid(path, ListenReply, answer)

    async def reach_group(self, command: ReachCommand) -> ReachReply:
        """Has the neuron connect to the other neurons of a group. Raises as `load`."""
        path = "/groups/reach"
        answer = await self._call(
            "POST", path, json_body=command.model_dump(mode="json"), timeout_secs=GROUP_TIMEOUT_SECS
        )
        return self._valid(path, ReachReply, answer)

    async def lease(self, command: LeaseCommand, *, timeout_secs: float) -> LeaseReply:
        """Takes, renews or ends a lease on a load. Raises as `load`; NeuronRefused also if the neuron has no leases."""
        path = "/models/lease"
        answer = await self._call("POST", path, json_body=command.model_dump(mode="json"), timeout_secs=timeout_secs)
        return self._valid(path, LeaseReply, answer)

    async def endpoint(self, model_id: str, instance: str) -> EndpointReply:
        """The engine's base URL as seen from here: a loopback host is replaced by the neuron's own."""
        path = f"/models/{quote(model_id, safe='')}/endpoint"
        if instance:
            path += f"?instance={quote(instance, safe='')}"
        answer = await self._call("GET", path, timeout_secs=ENDPOINT_TIMEOUT_SECS)
        found = self._valid("/models/{model_id}/endpoint", EndpointReply, answer)
        try:
            return reachable(found, self._base)
        except ValueError as error:
            raise NeuronRefused(200, f"{self.name}: endpoint of {model_id!r}: {error}") from error

    async def listen(self, on_event: OnEvent) -> None:
        """Calls `on_event` with the name and the data of each event until the connection ends.

        Raises:
            NeuronRefused: with 404, the neuron has no event stream.
            NeuronUnreachable: the connection failed.
        """
        head = self._head("GET", "/events", b"accept: text/event-stream")
        with self._streaming("events"):
            await follow(self._pool, self._address, head, on_event, silence_secs=EVENT_SILENCE_SECS)

    async def log_lines(self, model_id: str, instance: str, tail: int) -> list[str]:
        """The last `tail` lines that the engine has written."""
        reply = await self._call("GET", _logs_path(model_id, instance, tail), timeout_secs=LOGS_TIMEOUT_SECS)
        return self._valid("/models/{model_id}/logs", LogsReply, reply).lines

    async def follow_log(self, model_id: str, instance: str, tail: int, on_line: Callable[[str], None]) -> None:
        """Calls `on_line` with the last `tail` lines and each that follows, until the engine is gone. Raises as
        `listen`."""
        head = self._head("GET", _logs_path(model_id, instance, tail) + "&follow=true", b"accept: text/event-stream")
        with self._streaming("log"):
            await follow_lines(self._pool, self._address, head, on_line, silence_secs=EVENT_SILENCE_SECS)

    @contextlib.contextmanager
    def _streaming(self, what: str) -> Iterator[None]:
        try:
            yield
        except NoEventStream as error:
            raise NeuronRefused(error.status, f"{self.name}: no {what}") from error
        except (NoConnection, OSError, asyncio.TimeoutError, ValueError) as error:
            raise NeuronUnreachable(f"{self.name}: {what}: {_reason(error)}") from error

    def _valid(self, path: str, wanted: type[Wanted], data: Any) -> Wanted:
        try:
            return self.answers.read(path, wanted, data)
        except ValidationError as error:
            reason = f"invalid answer of {path}: {_first(error)}"
            raise NeuronRefused(200, f"{self.name}: {reason}", reason=reason) from error

    async def _command(self, path: str, body: BaseModel, timeout_secs: float) -> Any:
        """Sends a command that may take long. Raises as `load`."""
        data = body.body() if isinstance(body, LoadCommand) else body.model_dump(mode="json", exclude_none=True)
        call = asyncio.create_task(
            self._call("POST", path, json_body=data, timeout_secs=timeout_secs), name=f"{path} on {self.name}"
        )
        self._commands.add(call)
        try:
            await asyncio.wait([call])
            if call.cancelled():
                raise CommandAbandoned(self.name)
            return await call
        finally:
            self._commands.discard(call)
            call.cancel()

    async def _call(self, method: str, path: str, *, json_body: Any = None, timeout_secs: float | None = None) -> Any:
        if json_body is None:
            head, body = self._head(method, path), b""
        else:
            body = json.dumps(json_body).encode()
            head = self._head(method, path, b"content-type: application/json\r\ncontent-length: %d" % len(body))
        try:
            async with timeout(timeout_secs):
                answer = await self._answer(method, path, head, body)
        except asyncio.TimeoutError as error:
            raise NeuronUnreachable(f"{self.name}: {method} {path}: {_reason(error)}") from error
        try:
            return self._json(method, path, answer.body)
        except NeuronRefused:
            if method == "GET":
                raise
            return None  # the status says that the command was carried out

    def _head(self, method: str, path: str, more: bytes = b"") -> bytes:
        line = b"%b %b%b HTTP/1.1" % (method.encode(), self._prefix, path.encode("ascii"))
        headers = [line, self._headers]
        request_id = current_request_id()
        if request_id is not None:  # so that the neuron's log names the request that caused the call
            headers.append(b"x-request-id: " + request_id.encode())
        if more:
            headers.append(more)
        return b"\r\n".join((*headers, b"", b""))

    async def _answer(self, method: str, path: str, head: bytes, body: bytes) -> NeuronAnswer:
        """An answer with a status below 300."""
        context = f"{self.name}: {method} {path}"
        try:
            # Never send a load twice: when a kept connection breaks, the neuron may already have received it.
            answer = await fetch(self._pool, self._address, head, body, again=method == "GET")
        except AnswerTooLarge as error:
            raise NeuronRefused(error.status, f"{context}: {error}", reason=str(error)) from error
        except (NoConnection, OSError, UnicodeError, asyncio.TimeoutError) as error:  # UnicodeError: no host name
            reason = _reason(error)
            raise NeuronUnreachable(f"{context}: {reason}", reason) from error
        if answer.status < 300:
            return answer
        if answer.status < 400:
            reason = f"HTTP {answer.status}: redirects are not followed"
        elif answer.status == 401:
            reason = WRONG_CREDENTIALS if b"authorization: " in self._headers else NO_CREDENTIALS
        else:
            raise _refusal(answer.status, answer.body.decode("utf-8", "replace"), context)
        raise NeuronRefused(answer.status, f"{context}: {reason}", reason=reason)

    def _json(self, method: str, path: str, body: bytes) -> Any:
        body = body.removeprefix(codecs.BOM_UTF8)
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError):
            pass
        try:  # Python's parser also accepts what some neurons send: NaN, invalid UTF-8
            return json.loads(body.decode("utf-8", "replace")) if body else None
        except (ValueError, RecursionError) as error:
            reason = f"the answer of {path} is not JSON"
            raise NeuronRefused(200, f"{self.name}: {reason}", reason=reason) from error


def _logs_path(model_id: str, instance: str, tail: int) -> str:
    path = f"/models/{quote(model_id, safe='')}/logs?tail={tail}"
    return f"{path}&instance={quote(instance, safe='')}" if instance else path


def _header_value(text: str) -> bytes:
    """Raises ValueError for control characters."""
    if any(ord(character) < 32 for character in text.strip()):
        raise ValueError("the token must not contain line breaks or other control characters")
    return text.strip().encode()


def _refusal(status: int, text: str, context: str) -> NeuronRefused:
    """Parses our error envelope or a flat `{"error": "text"}`; treats anything else as text."""
    try:
        data = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        data = None
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        code, cause = error.get("code"), error.get("cause")
        return NeuronRefused(
            status,
            error["message"],
            code if isinstance(code, str) else None,
            cause=cause if isinstance(cause, str) else None,
            permanent=error.get("permanent") is True,
            devices=_figures(error.get("devices")),
        )
    if isinstance(error, str):
        code = data.get("code")  # helexa's neuron puts it beside the text
        return NeuronRefused(status, error, code if isinstance(code, str) else None)
    reason = f"HTTP {status}: {text[:500].strip()}"
    return NeuronRefused(status, f"{context}: {reason}", reason=reason)


def _figures(data: Any) -> list[DeviceFigures]:
    try:
        return read_answer(list[DeviceFigures], data or [])[0]
    except ValidationError:
        return []


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    return str(error) or type(error).__name__


def _first(error: ValidationError) -> str:
    return ": ".join(first_problem(error))
