"""cortex reads the engine's token counts as they pass, however the answer is split."""

from __future__ import annotations

import re
import time

import pytest

from tests.cortex.conftest import RunningCortex
from tests.cortex.raw_engine import RawEngine, answering, plain, stream_head
from tests.cortex.raw_http import DEADLINE_SECS, chunked, connected, request, single_bytes

MODEL = "org/small"


def tokens(text: str) -> dict[str, float]:
    """cortex_tokens_total by kind."""
    return {kind: float(n) for kind, n in re.findall(r'cortex_tokens_total\{kind="(\w+)",[^}]*\} (\S+)', text)}


USAGE = b'"usage": {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}'
OPENAI = b'data: {"choices": [], "usage": null}\n\ndata: {"choices": [], ' + USAGE + b"}\n\ndata: [DONE]\n\n"
ANTHROPIC = (
    b'event: message_start\ndata: {"type": "message_start", "message": {"usage": {"input_tokens": 3}}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"input_tokens":3,"output_tokens":5}}\n\n'
    b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
)
ANSWERS = {
    "plain": ("/v1/completions", plain(b'{"choices": [{"text": "x"}], ' + USAGE + b"}")),
    "plain-chunked": (
        "/v1/completions",
        stream_head(content_type="application/json") + chunked(b"{" + USAGE + b"}", 9),
    ),
    "sse": ("/v1/completions", stream_head() + chunked(OPENAI, 64)),
    "sse-chunks-of-1": ("/v1/completions", stream_head() + chunked(OPENAI, 1)),
    "sse-chunks-of-7": ("/v1/completions", stream_head() + chunked(OPENAI, 7)),
    "anthropic": ("/v1/messages", stream_head() + chunked(ANTHROPIC, 80)),
    "anthropic-plain": ("/v1/messages", plain(b'{"usage": {"input_tokens": 3, "output_tokens": 5}}')),
}


@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "byte-by-byte"])
@pytest.mark.parametrize("kind", ANSWERS)
async def test_usage_is_counted_however_it_is_cut(
    cortex: RunningCortex, engine: RawEngine, kind: str, bytewise: bool
) -> None:
    """Chunk and segment borders inside the usage object make no difference."""
    target, sent = ANSWERS[kind]
    engine.scripts.append(answering(*single_bytes(sent)) if bytewise else answering(sent))
    async with connected(cortex.url) as client:
        answer = await client.ask(request(b'{"model":"org/small"}', target=target))
    assert answer.status == 200
    # cortex counts when it sees the end, which may be a moment after the client has it.
    deadline = time.monotonic() + DEADLINE_SECS
    while (found := tokens(await metrics(cortex))) != {"prompt": 3.0, "completion": 5.0}:
        assert time.monotonic() < deadline, found
    page, labels = await metrics(cortex), f'model="{MODEL}",node="benjy"'
    assert f'cortex_requests_total{{{labels},status="200"}} 1.0' in page
    assert f'cortex_relayed_bytes_total{{kind="request",{labels}}} 21.0' in page
    for name in ("cortex_time_to_first_token_seconds_count", "cortex_time_per_token_seconds_count"):
        assert (f"{name}{{{labels}}} 1.0" in page) == ("plain" not in kind)


async def test_cached_prompt_tokens_are_counted(cortex: RunningCortex, engine: RawEngine) -> None:
    """How much an engine's prefix cache saves is visible per model and node."""
    usage = b'{"prompt_tokens": 30, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 16}}'
    engine.scripts.append(answering(plain(b'{"choices": [], "usage": ' + usage + b"}")))
    async with connected(cortex.url) as client:
        await client.ask(request(b'{"model":"org/small"}'))
    deadline = time.monotonic() + DEADLINE_SECS
    while (found := tokens(await metrics(cortex))) != {"prompt": 30.0, "completion": 5.0, "cached": 16.0}:
        assert time.monotonic() < deadline, found


async def metrics(cortex: RunningCortex) -> str:
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as response:
        return await response.text()
