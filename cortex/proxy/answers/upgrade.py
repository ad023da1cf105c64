"""An engine's answer to a client that asks for a WebSocket."""

from __future__ import annotations

from cortex.http.heads import ResponseHead
from cortex.proxy.answers.answer import DirectAnswer
from cortex.upstream.connection import Body


class UpgradeAnswer(DirectAnswer):
    """Accepts the WebSocket if the engine does; then the engine's bytes follow as they are. A refusal is passed on."""

    __slots__ = ()

    def begin(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        self.request.keep_alive = False
        if head.status != 101:
            return super().begin(head, body, first)
        self.body = body
        lines = [
            b"HTTP/1.1 101 " + head.reason,
            *head.passed,
            self.extra,
            b"connection: Upgrade",
            b"upgrade: websocket",
            b"",
            first,
        ]
        self.tail.feed(first)
        self.client.transport.write(b"\r\n".join(lines))
        return False
