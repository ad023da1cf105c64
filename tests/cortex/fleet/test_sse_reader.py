"""Server-sent events as a neuron sends them."""

from __future__ import annotations

import pytest

from cortex.fleet.sse_reader import MAX_EVENT_BYTES, EventReader
from tests.cortex.raw_http import every_split

STREAM = (
    b": a comment\n\n"
    b'event: snapshot\nid: 1\ndata: [{"id": "\xc3\xa9"}]\n\n'
    b'event: model\r\ndata: {"id":\r\ndata: 1}\r\n\r\n'
    b"data: not JSON\n\n"
    b'data: {"last": true}\n\n'
)
EVENTS = [("snapshot", [{"id": "é"}]), ("model", {"id": 1}), ("message", {"last": True})]


def test_events_are_read_from_pieces_of_any_size() -> None:
    """The stream may be cut at any byte, and arrive in single bytes."""
    for pieces in (*every_split(STREAM), [STREAM[i : i + 1] for i in range(len(STREAM))]):
        reader = EventReader()
        assert [event for piece in pieces for event in reader.feed(piece)] == EVENTS


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 65536, b"data: " + b"x" * 65530 + b"\n"])
def test_an_endless_line_or_event_is_an_error(piece: bytes) -> None:
    """The limit applies to a line and to all lines of one event."""
    reader = EventReader()
    for _ in range(MAX_EVENT_BYTES // 65536 - 1):
        assert list(reader.feed(piece)) == []
    with pytest.raises(ValueError, match="too long"):
        list(reader.feed(piece * 2))
