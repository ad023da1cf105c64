"""Stands in for llama-swap, with its command line and the part of its configuration that the benchmark writes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


class Swapper:
    """The one engine that runs."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._model = ""
        self._engine: subprocess.Popen[bytes] | None = None
        self._port = int(config["startPort"])

    def url(self, model: str) -> str:
        """Where the model's engine answers, once it does."""
        if model != self._model:
            self.stop()
            entry = self._config["models"][model]
            command = shlex.split(entry["cmd"].replace("${PORT}", str(self._port)))
            environ = dict(each.split("=", 1) for each in entry["env"])
            self._engine, self._model = subprocess.Popen(command, env={**os.environ, **environ}), model
        url = str(self._config["models"][model]["proxy"]).replace("${PORT}", str(self._port))
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                return url
            time.sleep(0.01)

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.terminate()
            self._engine.wait()
            self._engine, self._model = None, ""


class Handler(BaseHTTPRequestHandler):
    swapper: Swapper

    def do_GET(self) -> None:
        if self.path == "/unload":
            self.swapper.stop()
        self._answer(b"OK")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = urllib.request.Request(self.swapper.url(json.loads(body)["model"]) + self.path, data=body)
        with urllib.request.urlopen(request) as answer:
            self._answer(answer.read())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    given = parser.parse_args()
    Handler.swapper = Swapper(json.loads(given.config.read_text(encoding="utf-8")))
    host, _, port = given.listen.partition(":")
    server = HTTPServer((host, int(port)), Handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.serve_forever()
    finally:
        Handler.swapper.stop()


if __name__ == "__main__":
    main()
