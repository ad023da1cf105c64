"""Clients that read event streams loosely: what they make of comments between and before events."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator

import pytest

from cortex.http.event_stream import sign_of_life
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.test_silence import END, asking, paced
from tests.cortex.raw_engine import RawEngine, stream_head
from tests.cortex.raw_http import chunked, connected

MODEL = "org/small"
EVENTS = [b'data: {"n": 0}\n\n', b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]


def read_as_openai_go(stream: bytes) -> Iterator[tuple[str, str]]:
    """The decoder of openai-go (packages/ssestream): a blank line dispatches an event, even an empty one, and its data
    is parsed as JSON."""
    event, data = "", ""
    for line in stream.decode().removesuffix("\n").split("\n"):
        if not line:
            yield event, data
            event, data = "", ""
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            event = value
        elif name == "data":
            data += value + "\n"


def read_by_blank_lines(stream: bytes) -> Iterator[tuple[str, str]]:
    """Splits into blocks at blank lines, then each block into lines; as sseclient does."""
    for block in re.split(r"\r\n\r\n|\n\n|\r\r", stream.decode()):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        if fields:
            yield fields.get("event", ""), fields["data"]


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron) -> AsyncIterator[RunningCortex]:
    """Its engine is silent before its head, before its first event and between events."""
    async with RawEngine().running() as engine:
        pieces = [chunked(event, 9).removesuffix(END) for event in EVENTS]
        engine.script = paced(b"", stream_head(), *pieces, END)
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield await start_cortex([benjy], [{"id": MODEL}], gateway={"keepalive_secs": 0.3})


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/messages"])
async def test_loose_readers_find_each_event(cortex: RunningCortex, target: str) -> None:
    """No event is lost and no empty one comes."""
    async with connected(cortex.url) as client:
        body = (await client.ask(asking(target))).body
    assert body.count(b": ") > len(EVENTS)
    for read in (read_as_openai_go, read_by_blank_lines):
        events = [(event, data.strip()) for event, data in read(body)]
        assert [data for event, data in events if event != "ping"] == [
            event.decode().removeprefix("data: ").strip() for event in EVENTS
        ]
        for event, data in events:
            if event == "ping":
                assert json.loads(data) == {"type": "ping"}


def test_blank_line_behind_a_comment_would_be_an_empty_event() -> None:
    """Why there is none."""
    comment = sign_of_life("loading", ping=False)
    assert list(read_as_openai_go(comment)) == []
    assert list(read_as_openai_go(comment + b"\n")) == [("", "")]
