"""Reading `usage` from the bytes of an answer."""

from __future__ import annotations

import tracemalloc

import pytest

from cortex.upstream.tail import UsageTail
from cortex.upstream.usage import Usage, find_usage

CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1795545739,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
CHAT_END = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1795545739,"model":"m",'
    b'"choices":[],"usage":{"prompt_tokens":345,"total_tokens":900,"completion_tokens":555,"prompt_tokens_details":'
    b'{"cached_tokens":320,"created_cache_tokens":null,"multimodal_tokens":{"image":256}}}}\n\ndata: [DONE]\n\n'
)
MESSAGE_END = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
    b'"usage":{"input_tokens":25,"output_tokens":555,"cache_read_input_tokens":320}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\ndata: [DONE]\n\n'
)
RESPONSE_END = (
    b'event: response.completed\ndata: {"response":{"id":"resp_0123456789abcdef","output":[{"type":"message",'
    b'"content":[{"text":"a long \\"usage\\": {\\"input_tokens\\": 1} text"}]}],'
    b'"tools":[{"parameters":{"usage":{"type":"object"}}}],'
    b'"truncation":"disabled","usage":{"input_tokens":345,"input_tokens_details":{"cached_tokens":320,'
    b'"cache_write_tokens":0,"input_tokens_per_turn":[],"cached_tokens_per_turn":[]},"output_tokens":555,'
    b'"output_tokens_details":{"reasoning_tokens":0,"tool_output_tokens":0,"output_tokens_per_turn":[]},'
    b'"total_tokens":900},"user":null,"presence_penalty":null,"frequency_penalty":null,"kv_transfer_params":null,'
    b'"ec_transfer_params":null,"input_messages":null,"output_messages":null},"sequence_number":581,'
    b'"type":"response.completed"}\n\n'
)
PLAIN_END = (
    b'{"id":"chatcmpl-01","choices":[{"index":0,"message":{"role":"assistant","content":"\\"usage\\":{}"}}],'
    b'"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":345,"total_tokens":900,'
    b'"completion_tokens":555,"prompt_tokens_details":{"cached_tokens":320}},"prompt_logprobs":null,'
    b'"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null}'
)


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":5}}', Usage(3, 5)),
        (b'data: {"usage": null}\n\ndata: {"usage": {"prompt_tokens": 3, "completion_tokens": 5}}\n\n', Usage(3, 5)),
        (b'data: {"type":"message_delta","usage":{"input_tokens":3,"output_tokens":5}}\n\n', Usage(3, 5)),
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":null}}', Usage(3, 0)),
        (b'{"data": []}', None),
        (b'"usage": {"broken', None),
        (b"\xff\xfe", None),
    ],
)
def test_usage_is_read_from_the_end(answer: bytes, usage: Usage | None) -> None:
    """OpenAI's and Anthropic's names; anything else is ignored."""
    assert find_usage(answer) == usage


def test_usage_is_found_behind_a_long_answer_in_small_chunks() -> None:
    """The kept tail is bounded and still contains it."""
    tail = UsageTail()
    for _ in range(100_000):
        tail.feed(b"data: x\n\n")
    for byte in b'{"usage": {"prompt_tokens": 3, "completion_tokens": 5}}':
        tail.feed(bytes([byte]))
    assert tail.usage() == Usage(3, 5)


@pytest.mark.parametrize("end", [CHAT_END, MESSAGE_END, RESPONSE_END, PLAIN_END])
@pytest.mark.parametrize("size", [1, 7, 190, 5000, 1 << 20])
def test_usage_of_an_answer_as_vllm_writes_it(end: bytes, size: int) -> None:
    """The engine's counts are found for each API and any split, never numbers from the text."""
    answer, tail = CHUNK * 60 + end, UsageTail()
    for start in range(0, len(answer), size):
        tail.feed(answer[start : start + size])
    assert tail.usage() == Usage(345, 555, 320)


def test_usage_is_read_across_the_framing_of_a_chunked_answer() -> None:
    """Chunk sizes stand between the bytes, and an engine may split anywhere, also inside `usage`."""
    for cut in range(1, len(CHAT_END)):
        tail, one, two = UsageTail(), CHAT_END[:cut], CHAT_END[cut:]
        tail.feed(b"%x\r\n%s\r\n%x;x=y\r\n%s\r\n0\r\n\r\n" % (len(one), one, len(two), two))
        assert tail.usage() == Usage(345, 555, 320), cut


@pytest.mark.parametrize("size", [100, 100_000])
def test_usage_before_long_results_is_found(size: int) -> None:
    """An answer of the reranking API has it at the beginning."""
    answer, tail = b'{"id":"rerank-1","model":"m","usage":{"prompt_tokens":9,"total_tokens":9},"results":[', UsageTail()
    answer += b'{"index":0,"document":{"text":"x"},"relevance_score":0.5},' * 1000
    for start in range(0, len(answer), size):
        tail.feed(answer[start : start + size])
    assert tail.usage() == Usage(9, 0)


@pytest.mark.parametrize(
    "hostile",
    [
        b'{"text":"\\"usage\\": {\\"prompt_tokens\\": 3}","x\\"usage":{"prompt_tokens":3}}',
        b'{"usage":{"type":"duration","seconds":3}}',
        b'{"usage":{"prompt_tokens":%s}}' % (b"9" * 1000),
        b'{"usage":{"prompt_tokens":-1,"completion_tokens":1e400,"prompt_tokens_details":[]}}',
        b'{"usage":{"prompt_tokens":"3","completion_tokens":{}, "prompt_tokens_details":{"cached_tokens":"1"}}}',
        b'"usage":{"a":' * 300,
        b'"usage":{"a":' + b"[" * 3000,
        b'"usage":{"prompt_tokens":1' * 300,
        b'"usage":' * 500,
        b'"usage":{"\xff":"\xed\xa0\x80',
        b"\r\n0" * 1000,
    ],
)
def test_hostile_answers_have_no_usage(hostile: bytes) -> None:
    """Nothing raises, and no text, absurd number or other object of that name is counted."""
    tail = UsageTail()
    tail.feed(hostile)
    assert tail.usage() in {None, Usage(0, 0)}


def test_no_more_is_cached_than_the_prompt() -> None:
    """The rest of the prompt would be negative, and so its cost."""
    assert find_usage(b'{"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":9}}}') == Usage(3, 0, 3)


def test_a_large_chunk_is_not_copied() -> None:
    """Only a few KiB of a chunk of 256 KiB are kept."""
    tail, chunk = UsageTail(), bytes(1 << 18)
    tracemalloc.start()
    try:
        for _ in range(20):
            tail.feed(chunk)
        assert tracemalloc.get_traced_memory()[1] < 16_384
    finally:
        tracemalloc.stop()
