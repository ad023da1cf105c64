"""Which answer a request wants from the fake engine. The prompt says so, because gateways may change headers and
unknown fields but forward the prompt unchanged: `[[bench chunks=100;interval=0.02]]`."""

from __future__ import annotations

from dataclasses import dataclass

OPENING, CLOSING = b"[[bench ", b"]]"


@dataclass(frozen=True)
class AnswerSpec:
    """`chunks` > 0: a stream of that many token events, `interval` seconds apart, the first one immediately.
    Otherwise a plain answer with `size` bytes of text. `hold`: after the first event the stream waits for
    `POST /bench/release`.
    """

    chunks: int = 0
    interval: float = 0.0
    size: int = 0
    hold: bool = False

    def text(self) -> str:
        """The text to put into a prompt."""
        return (
            f"{OPENING.decode()}chunks={self.chunks};interval={self.interval:g};size={self.size};"
            f"hold={int(self.hold)}{CLOSING.decode()}"
        )


_known: dict[bytes, AnswerSpec] = {}


def spec_in(body: bytes | bytearray) -> AnswerSpec:
    """The answer that a request's body asks for. Default: a short plain one.

    Raises:
        ValueError: a value is not a number.
    """
    start = body.find(OPENING)
    end = body.find(CLOSING, start)
    if start < 0 or end < 0:
        return AnswerSpec()
    text = bytes(body[start + len(OPENING) : end])
    spec = _known.get(text)
    if spec is None:
        fields = dict(field.split("=", 1) for field in text.decode().split(";"))
        spec = _known[text] = AnswerSpec(
            chunks=int(fields.get("chunks", 0)),
            interval=float(fields.get("interval", 0)),
            size=int(fields.get("size", 0)),
            hold=fields.get("hold", "0") == "1",
        )
    return spec
