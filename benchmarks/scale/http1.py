"""A small HTTP/1.1 keep-alive client that records when each answer started and ended."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A complete answer; times are `time.perf_counter`, in seconds."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes
    asked_at: float
    first_byte_at: float
    ended_at: float

    @property
    def secs(self) -> float:
        """From sending the request's last byte to receiving the answer's last byte."""
        return self.ended_at - self.asked_at

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection, one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> Connection:
        """Connects now rather than on the first request. Raises OSError."""
        await self._connected()
        return self

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        return self._streams

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.send(request_bytes("GET", path, None, headers))

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        return await self.send(request_bytes("POST", path, body, headers))

    async def send(self, request: bytes) -> Answer:
        """Sends a raw request and returns the answer. Raises OSError, or IncompleteReadError when it is cut off."""
        reader, writer = await self._connected()
        asked_at = time.perf_counter()
        writer.write(request)
        try:
            status_line = await reader.readline()
            first_byte_at = time.perf_counter()
            if not status_line:
                raise asyncio.IncompleteReadError(b"", None)
            headers = {}
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            body = await _body(reader, headers)
        except BaseException:
            self.close()
            raise
        if headers.get("connection", "").lower() == "close":
            self.close()
        status = int(status_line.split()[1])
        return Answer(status, headers, body, asked_at, first_byte_at, time.perf_counter())


def request_bytes(method: str, path: str, body: Any, headers: dict[str, str] | None = None) -> bytes:
    """A request with `body` as JSON; no body when it is None."""
    data = b"" if body is None else json.dumps(body).encode()
    fields = {"Host": "benchmark", **(headers or {})}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while True:
        size = int((await reader.readline()).partition(b";")[0], 16)
        body += (await reader.readexactly(size + 2))[:-2]
        if size == 0:
            return body


async def until_answers(host: str, port: int, path: str, *, within_secs: float, pause_secs: float = 0.05) -> Answer:
    """The first 200 response from `path`.

    Raises:
        TimeoutError: none within `within_secs`.
    """
    deadline = time.perf_counter() + within_secs
    last = "no answer"
    connection = Connection(host, port)
    while time.perf_counter() < deadline:
        try:
            answer = await connection.get(path)
            if answer.status == 200:
                connection.close()
                return answer
            last = f"{answer.status} {answer.body[:200]!r}"
        except (OSError, asyncio.IncompleteReadError) as error:
            last = str(error)
        await asyncio.sleep(pause_secs)
    connection.close()
    raise TimeoutError(f"{path}: not 200 within {within_secs:g} s: {last}")
