"""The barest engine: serves chat completions after a while, prints nothing, and records when what happened to it.

Run it as a script with `python -IS`: it imports as little as possible. Accepts vLLM's command line. It appends one line
of JSON to `--stamps` before its first answer to a POST: its pid, and the times of `STAMPS` as `time.monotonic`, which
all processes of a host share.
"""

from __future__ import annotations

import time

_STARTED = time.monotonic()

import json  # noqa: E402 - the time first
import os  # noqa: E402
import selectors  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402

STAMPS = ("started", "listening", "first_byte", "first_request")
"""It runs; its port is open; the first byte of anything has arrived; the first byte of a POST has."""

_ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "bench",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
).encode()
_MAX_BYTES = 1 << 16


def main() -> None:
    # Loads differ by up to a tenth: pauses between checks must not fall into step with them.
    time.sleep(float(_option("--load-secs")) * (1 + time.monotonic_ns() // 1000 % 100 / 1000))
    listener = socket.create_server(("127.0.0.1", int(_option("--port"))), backlog=128)
    stamps = {"started": _STARTED, "listening": time.monotonic()}
    serve(listener, stamps)


def serve(listener: socket.socket, stamps: dict[str, float]) -> None:
    """Answers every connection until the process is killed."""
    received: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    received[client] = b""
                    waiting.register(client, selectors.EVENT_READ)
                    continue
                client = key.fileobj  # type: ignore[assignment]
                data = _read(client)
                if not data:
                    waiting.unregister(client)
                    del received[client]
                    client.close()
                    continue
                stamps.setdefault("first_byte", time.monotonic())
                received[client] += data
                head, end, body = received[client].partition(b"\r\n\r\n")
                if end and len(body) >= _length(head):
                    received[client] = b""
                    client.sendall(_answer(head, stamps))


def _answer(head: bytes, stamps: dict[str, float]) -> bytes:
    if head.startswith(b"GET /health"):
        return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    if head.startswith(b"POST "):
        if "first_request" not in stamps:
            stamps["first_request"] = time.monotonic()
            _record(stamps)
        size = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_ANSWER)
        return b"HTTP/1.1 200 OK\r\n" + size + _ANSWER
    return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def _record(stamps: dict[str, float]) -> None:
    fd = os.open(_option("--stamps"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, json.dumps({"pid": os.getpid(), **stamps}).encode() + b"\n")
    os.close(fd)


def _read(client: socket.socket) -> bytes:
    try:
        return client.recv(_MAX_BYTES)
    except ConnectionError:
        return b""


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def _option(name: str) -> str:
    if name not in sys.argv:
        sys.exit(f"{name} is missing")
    return sys.argv[sys.argv.index(name) + 1]


if __name__ == "__main__":
    main()
