"""An engine that neuron has no code for: `fake_engine.py --port N [options] [args]`. Standard library only, so that it
starts at once. Its options say how it behaves; what it does not know it ignores, and shows at `/arguments`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(allow_abbrev=False)
PARSER.add_argument("--host", default="127.0.0.1")
PARSER.add_argument("--port", type=int, default=int(os.environ.get("FAKE_PORT", "0")))
PARSER.add_argument("--name", default="")
PARSER.add_argument("--prefix", default="")  # before /v1
PARSER.add_argument("--health", default="/health")
PARSER.add_argument("--say", action="append", default=[])  # lines of output, before it listens
PARSER.add_argument("--say-when", default="")  # a file: the last line waits until it exists
PARSER.add_argument("--exit", type=int)  # ends with this status instead of serving
PARSER.add_argument("--stop-with", default="")  # a file: the name of the signal that ended it
PARSER.add_argument("--metrics", default="")  # a file: the page of /metrics
OPTIONS, REST = PARSER.parse_known_args()
KEY = os.environ.get("FAKE_KEY")


class Api(BaseHTTPRequestHandler):
    """OpenAI's chat completions, models and metrics, with a key if it was given one."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == OPTIONS.health:
            self._reply(200, {})
        elif self.path == "/arguments":
            self._reply(200, {"argv": sys.argv[1:], "rest": REST, "env": dict(os.environ)})
        elif KEY is not None and self.headers.get("Authorization") != f"Bearer {KEY}":
            self._reply(401, {"error": {"message": "wrong key"}})
        elif self.path == "/metrics" and OPTIONS.metrics:
            self._send(200, "text/plain", Path(OPTIONS.metrics).read_bytes())
        elif self.path == f"{OPTIONS.prefix}/v1/models":
            self._reply(
                200, {"object": "list", "data": [{"id": OPTIONS.name, "object": "model", "meta": {"n_ctx": 4096}}]}
            )
        else:
            self._reply(404, {"error": {"message": f"no such path: {self.path}", "type": "not_found_error"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
        if KEY is not None and self.headers.get("Authorization") != f"Bearer {KEY}":
            self._reply(401, {"error": {"message": "wrong key"}})
        elif self.path != f"{OPTIONS.prefix}/v1/chat/completions":
            self._reply(404, {"error": {"message": f"no such path: {self.path}", "type": "not_found_error"}})
        elif body.get("stream"):
            self._stream(body["model"])
        else:
            message = {"role": "assistant", "content": f"pid {os.getpid()}"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._reply(200, _completion("chat.completion", body["model"], choices=[choice], usage=_USAGE))

    def _stream(self, model: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = [{"index": 0, "delta": {"content": word}, "finish_reason": None} for word in ("one ", "two")]
        events = [_completion("chat.completion.chunk", model, choices=[piece]) for piece in pieces]
        events.append(_completion("chat.completion.chunk", model, choices=[], usage=_USAGE))
        for text in [*map(json.dumps, events), "[DONE]"]:
            data = f"data: {text}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _reply(self, status: int, body: object) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def _completion(kind: str, model: str, **fields: Any) -> dict[str, Any]:
    return {"id": "c1", "object": kind, "created": 1, "model": model, **fields}


def _stopped(number: int, frame: object) -> None:
    if OPTIONS.stop_with:
        Path(OPTIONS.stop_with).write_text(signal.Signals(number).name, encoding="ascii")
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGTERM, _stopped)
    signal.signal(signal.SIGINT, _stopped)
    for line in OPTIONS.say[:-1] if OPTIONS.say_when else OPTIONS.say:
        print(line, flush=True)
    if OPTIONS.exit is not None:
        sys.exit(OPTIONS.exit)
    server = ThreadingHTTPServer((OPTIONS.host, OPTIONS.port), Api)
    if OPTIONS.say_when:
        threading.Thread(target=_say_last, daemon=True).start()
    server.serve_forever()


def _say_last() -> None:
    while not Path(OPTIONS.say_when).exists():
        time.sleep(0.01)
    print(OPTIONS.say[-1], flush=True)


if __name__ == "__main__":
    main()
