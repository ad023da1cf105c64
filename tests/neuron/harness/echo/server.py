"""The echo engine: `server.py HOST PORT`. Standard library only, so that it starts at once."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Echo(BaseHTTPRequestHandler):
    """`GET /healthz` is 200; a POST gets its own body."""

    def do_GET(self) -> None:
        self._reply(200 if self.path == "/healthz" else 404, b"")

    def do_POST(self) -> None:
        self._reply(200, self.rfile.read(int(self.headers.get("Content-Length", "0"))))

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Echo).serve_forever()
