"""Affinity keys: from the session header, or from the beginning of the prompt."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from typing import Any

import pytest

from cortex.routing.affinity import Affinity

CHAT = b"/v1/chat/completions"
COMPLETIONS = b"/v1/completions"
RESPONSES = b"/v1/responses"
MESSAGES = b"/v1/messages"
LONG = "You are a careful assistant. \n" * 20
SYSTEM = {"role": "system", "content": "be brief"}
HELLO = {"role": "user", "content": "hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0KGgo" * 100}}


def key(path: bytes, body: Any, *lines: bytes, chars: int = 256) -> int | None:
    """The key of a request. `body`: bytes, or an object to encode as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Affinity("X-Session-Id", chars).key(path, lines, data)


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("path", "first", "later"),
    [
        (CHAT, {"messages": [HELLO]}, {"messages": [HELLO, {"role": "assistant", "content": "hi"}, HELLO]}),
        (
            CHAT,
            {"messages": [SYSTEM, HELLO], "model": "m"},
            {"messages": [SYSTEM, HELLO, {"role": "assistant", "content": None, "tool_calls": [{}]}], "stream": True},
        ),
        (CHAT, user([{"type": "text", "text": "hello"}]), user("hello")),
        (
            MESSAGES,
            {"system": "be brief", "messages": [HELLO]},
            {"system": [{"type": "text", "text": "be brief", "cache_control": {}}], "messages": [HELLO, SYSTEM]},
        ),
        (
            RESPONSES,
            {"input": "hello", "instructions": "be brief"},
            {"input": [HELLO, SYSTEM], "instructions": "be brief"},
        ),
        (
            RESPONSES,
            {"input": [HELLO], "instructions": "be brief"},
            {"input": [{"type": "message", **HELLO}, {"type": "function_call"}], "instructions": "be brief"},
        ),
        (COMPLETIONS, {"prompt": LONG + "one"}, {"prompt": LONG + "two"}),
        (COMPLETIONS, {"prompt": ["hello", " world"]}, {"prompt": "hello world"}),
        (COMPLETIONS, {"prompt": list(range(200))}, {"prompt": [*range(200), 7]}),
        (CHAT, {"messages": [{"role": "system", "content": LONG}, HELLO]}, user(LONG)),
        (CHAT, user("a" * 200 + 'ä\n"\\' * 20), user("a" * 200 + 'ä\n"\\' * 19)),
        (
            CHAT,
            user([{"type": "text", "text": "see"}, IMAGE]),
            user([{"type": "text", "text": "see"}, IMAGE | {"x": 1}]),
        ),
    ],
)
def test_same_beginning_same_key(path: bytes, first: Any, later: Any) -> None:
    """Later turns of a conversation, and prompts with the same first 256 characters, have the same key."""
    assert key(path, first) is not None
    assert key(path, first) == key(path, later)


@pytest.mark.parametrize(
    ("path", "one", "other"),
    [
        (CHAT, user("hello"), user("hello!")),
        (CHAT, {"messages": [SYSTEM, HELLO]}, {"messages": [HELLO]}),
        (CHAT, {"messages": [SYSTEM, HELLO]}, {"messages": [SYSTEM, {"role": "user", "content": "bye"}]}),
        (CHAT, user("a" * 255 + "b"), user("a" * 255 + "c")),
        (CHAT, user("\U0001f600" * 255 + "b"), user("\U0001f600" * 255 + "c")),
        (
            CHAT,
            user([IMAGE]),
            user([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "j" * 1100}}]),
        ),
        (MESSAGES, {"system": "a", "messages": [HELLO]}, {"system": "b", "messages": [HELLO]}),
        (RESPONSES, {"input": "hello"}, {"input": "hello", "instructions": "be brief"}),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, {"prompt": [1, 2, 4]}),
        (COMPLETIONS, {"prompt": [[1, 2]]}, {"prompt": [[1, 3]]}),
    ],
)
def test_different_beginnings_have_different_keys(path: bytes, one: Any, other: Any) -> None:
    """One different character within the first 256 changes the key."""
    keys = key(path, one), key(path, other)
    assert None not in keys
    assert keys[0] != keys[1]


def test_escapes_do_not_change_the_key() -> None:
    """Escaped or not, the prompt is the same, and so is its entry in the engine's cache."""
    for text in ("grüße " * 60, "\U0001f600" * 256, "a/b\n" * 100, "\ud800 alone"):
        escaped = json.dumps(user(text)).encode()
        plain = json.dumps(user(text), ensure_ascii=False).encode("utf-8", "surrogatepass").replace(b"/", b"\\/")
        if "\ud800" in text:  # msgspec refuses the escaped form
            assert key(CHAT, plain) is not None
        else:
            assert key(CHAT, escaped) == key(CHAT, plain)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (b"/v1/embeddings", {"input": "hello"}),
        (b"/v1/messages/count_tokens", {"messages": [HELLO]}),
        (CHAT, {"model": "m"}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": None}),
        (CHAT, {"messages": [{}]}),
        (CHAT, {"messages": "hello"}),
        (CHAT, {"messages": [1, 2]}),
        (CHAT, user(None)),
        (CHAT, user("")),
        (CHAT, [user("hello")]),
        (CHAT, b""),
        (CHAT, b"{"),
        (CHAT, b'{"messages": [{"role": "user", "content": "a'),
        (CHAT, b'{"messages": ' + b"[" * 100_000),
        (CHAT, b"--form\r\n"),
        (COMPLETIONS, {"prompt": None}),
        (COMPLETIONS, {"prompt": ""}),
        (RESPONSES, {"input": [1]} | {"input": None}),
    ],
)
def test_no_prompt_has_no_key(path: bytes, body: Any) -> None:
    """Without a prompt, or with a body of the wrong shape, there is no key and no error."""
    assert key(path, body) is None


def test_session_header_wins() -> None:
    """Its case does not matter, and an empty one counts as absent. Paths without prompts have no sessions."""
    one, two = (
        key(CHAT, user("one"), b"accept: */*", b"X-SESSION-ID: abc"),
        key(CHAT, user("two"), b"x-session-id:abc "),
    )
    assert one == two != key(CHAT, user("one"))
    assert key(CHAT, user("one"), b"x-session-id: other") != one
    assert key(CHAT, user("one"), b"x-session-id:  ", b"x-session-idle: abc") == key(CHAT, user("one"))
    assert key(CHAT, b"not json", b"x-session-id: abc") == one
    assert key(b"/v1/embeddings", {"input": "a"}, b"x-session-id: abc") is None


def test_both_can_be_turned_off() -> None:
    """Without a header name and with 0 characters, requests have no key."""
    affinity = Affinity("", 0)
    assert affinity.key(CHAT, [b": x", b"x-session-id: abc"], json.dumps(user("hello")).encode()) is None
    assert Affinity("x-session-id", 0).key(CHAT, [b"x-session-id: abc"], b"{}") is not None


def _anything(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randrange(8 if depth < 4 else 5)
    if kind < 5:
        text = "".join(generator.choice('ab"\\\n\u00e4\u20ac\U0001f600 {}[]') for _ in range(generator.randrange(40)))
        return (None, True, generator.randrange(-9, 9**9), 0.5, text)[kind]
    if kind == 5:
        return [_anything(generator, depth + 1) for _ in range(generator.randrange(9))]
    names = ("role", "content", "text", "type", "messages", "prompt", "input", "system", "instructions", "x")
    found = {generator.choice(names): _anything(generator, depth + 1) for _ in range(generator.randrange(7))}
    if generator.random() < 0.3:
        found["role"] = "user"
    return found


def test_any_json_has_a_key_or_none() -> None:
    """Any shape, cut anywhere. Unknown members, white space and what follows the beginning change nothing."""
    generator = random.Random(11)
    found = 0
    for _ in range(1500):
        body = {name: _anything(generator) for name in ("messages", "prompt", "input", "system", "instructions")}
        if generator.random() < 0.7:
            body["messages"] = [_anything(generator, 2) for _ in range(3)]
        data = json.dumps(body, ensure_ascii=generator.random() < 0.5).encode()
        for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
            whole = key(path, data)
            found += whole is not None
            assert key(path, b'{"y": [{"role": "user"}], ' + data[1:]) == whole
            key(path, data[: generator.randrange(len(data))])
    assert found > 1500


@pytest.mark.parametrize(
    "body",
    [
        user("x" * (4 << 20)),
        user("\n" * (2 << 20)),
        user([{"type": "image_url", "image_url": {"url": "x" * (4 << 20)}}]),
        user([{}] * (1 << 18)),
        {"messages": [{}] * (1 << 18)},
        {"messages": [], "x": [[]] * (1 << 18)},
        {"messages": [{"role": "user", "content": {"a": [1] * (1 << 18)}}]},
    ],
    ids=["text", "escapes", "image", "parts", "messages", "beside", "object"],
)
def test_a_large_body_is_not_built(body: Any) -> None:
    """Several MB take about as long as a parse that creates nothing, and hardly any memory."""
    data = json.dumps(body).encode()
    tracemalloc.start()
    try:
        key(CHAT, data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    started = time.process_time()
    json.loads(data)
    parse = time.process_time() - started
    started = time.process_time()
    key(CHAT, data)
    assert time.process_time() - started < max(parse, 0.05)
