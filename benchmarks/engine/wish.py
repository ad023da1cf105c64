"""What a request asks the fake engine for. It is written into the prompt, which every gateway passes on unchanged,
whatever it does to headers and to unknown fields: `[[bench chunks=100;interval=0.02]]`."""

from __future__ import annotations

from dataclasses import dataclass

OPENING, CLOSING = b"[[bench ", b"]]"


@dataclass(frozen=True)
class Wish:
    """`chunks` > 0: a stream of so many token events, `interval` seconds apart, the first one at once.
    Otherwise a plain answer with `size` bytes of text. `hold`: after the first event the stream waits for
    `POST /bench/release`.
    """

    chunks: int = 0
    interval: float = 0.0
    size: int = 0
    hold: bool = False

    def text(self) -> str:
        """As it stands in a prompt."""
        return (
            f"{OPENING.decode()}chunks={self.chunks};interval={self.interval:g};size={self.size};"
            f"hold={int(self.hold)}{CLOSING.decode()}"
        )


_known: dict[bytes, Wish] = {}


def wish_in(body: bytes | bytearray) -> Wish:
    """The wish in a request's body; without one, a short plain answer.

    Raises:
        ValueError: a value is no number.
    """
    start = body.find(OPENING)
    end = body.find(CLOSING, start)
    if start < 0 or end < 0:
        return Wish()
    text = bytes(body[start + len(OPENING) : end])
    wish = _known.get(text)
    if wish is None:
        fields = dict(field.split("=", 1) for field in text.decode().split(";"))
        wish = _known[text] = Wish(
            chunks=int(fields.get("chunks", 0)),
            interval=float(fields.get("interval", 0)),
            size=int(fields.get("size", 0)),
            hold=fields.get("hold", "0") == "1",
        )
    return wish
