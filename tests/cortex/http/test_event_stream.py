"""Where an event ends, in a stream of chunks of any size."""

from __future__ import annotations

import pytest

from cortex.http.event_stream import ends_event, sign_of_life
from tests.cortex.raw_http import chunked

LAST_CHUNK = b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 100])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("line", ["{:x}", "{:X}", "00{:x}", "{:x};a=b"])
def test_end_is_found_in_chunks_of_any_size(size: int, end: bytes, line: str) -> None:
    """Only a whole blank line ends an event, wherever the chunks are cut."""
    event = b'data: {"a": 1}' + end
    for kept in range(1, len(event) + 1):
        framed = chunked(event[:kept], size, line=line).removesuffix(LAST_CHUNK)
        assert ends_event(framed, in_chunks=True) == (kept == len(event)), (kept, framed)
        assert ends_event(event[:kept], in_chunks=False) == (kept == len(event))


def test_nothing_sent_is_between_events() -> None:
    """Before the first byte an error event needs no line end in front of it."""
    assert ends_event(b"", in_chunks=True)
    assert ends_event(b"", in_chunks=False)


def test_sign_of_life_is_one_line() -> None:
    """No blank line follows it: some clients would treat that as an empty event."""
    assert sign_of_life("a\r\n\r\ndata: x\n" + "y" * 1000, ping=False) == b": a data: x " + b"y" * 490 + b"\n"
    assert sign_of_life("a", ping=True) == b': a\nevent: ping\ndata: {"type": "ping"}\n\n'
