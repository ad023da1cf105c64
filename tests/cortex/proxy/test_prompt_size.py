"""What is certain of a request's length, and the refusal of one that cannot fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cortex.proxy.prompt.local_tokenizer import local_tokenizer
from cortex.proxy.prompt.prompt_size import PromptSize, excess, prompt_size

CHAT, COMPLETION, MESSAGES, RESPONSES = (
    b"/v1/chat/completions",
    b"/v1/completions",
    b"/v1/messages",
    b"/v1/responses",
)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
USER = {"role": "user", "content": "hello"}


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (CHAT, {"messages": [USER]}, "hello"),
        (CHAT, {"messages": user({"type": "text", "text": " a"}, IMAGE, {"type": "text", "text": "b\n"})}, "ab"),
        (MESSAGES, {"messages": user({"type": "text", "text": "a"}, {"type": "tool_result", "content": "b"})}, "a"),
        (RESPONSES, {"input": "hello"}, "hello"),
        (RESPONSES, {"input": user({"type": "input_text", "text": "a"})}, "a"),
        (CHAT, {"messages": user({"type": "text", "text": "a "}, {"type": "text", "text": " \nb"})}, "ab"),
        (COMPLETION, {"prompt": " hello\n"}, " hello\n"),
        # A template may leave these out, trim them, or write them in another way.
        (CHAT, {"messages": [USER, {"role": "assistant", "content": "x" * 99}]}, ""),
        (CHAT, {"messages": [USER, {"role": "tool", "content": "x" * 99}]}, ""),
        (CHAT, {"messages": [{"role": "system", "content": "x" * 99}]}, ""),
        (CHAT, {"messages": [{"role": "user", "content": "old" * 99}, USER]}, "hello"),
        (CHAT, {"messages": [USER], "chat_template": "{{ 1 }}"}, ""),
        # The engine cuts the prompt.
        (CHAT, {"messages": [USER], "truncate_prompt_tokens": -1}, ""),
        (RESPONSES, {"input": "hello", "truncation": "auto"}, ""),
        (RESPONSES, {"input": "hello", "truncation": "disabled"}, "hello"),
        # Several prompts, and what is not a request.
        (COMPLETION, {"prompt": ["a", "b"]}, ""),
        (CHAT, {"messages": "hello"}, "hello"),
        (CHAT, {"messages": [1]}, ""),
        (CHAT, {"messages": user()}, ""),
        (CHAT, {}, ""),
    ],
)
def test_only_what_is_certainly_in_the_prompt_counts(path: bytes, body: dict[str, Any], text: str) -> None:
    assert prompt_size(path, json.dumps(body).encode()).text == text


@pytest.mark.parametrize(
    ("path", "fields", "name", "limit"),
    [
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, "max_tokens", 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", 6),
        (COMPLETION, {"max_tokens": 5}, "max_tokens", 5),
        (MESSAGES, {"max_tokens": 5}, "max_completion_tokens", 5),
        (RESPONSES, {"max_output_tokens": 5, "truncation": "auto"}, "max_output_tokens", 5),
        (CHAT, {"max_tokens": True}, "max_tokens", 0),
        (CHAT, {"max_tokens": "5"}, "max_tokens", 0),
    ],
)
def test_limit_of_the_answer(path: bytes, fields: dict[str, Any], name: str, limit: int) -> None:
    found = prompt_size(path, json.dumps(fields).encode())
    assert (found.limit_name, found.limit) == (name, limit)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages": NaN}', b"\xff", b"[" * 10_000])
def test_what_cannot_be_read_is_the_engines_business(body: bytes) -> None:
    assert prompt_size(CHAT, body) == PromptSize()


def test_refusals_are_vllms() -> None:
    """Its words, its type and its code; nothing below them, and a prompt and a limit that exceed it only together are
    the engine's business."""
    found = excess(PromptSize(limit=101, limit_name="max_tokens"), 100, 5)
    assert found is not None
    assert found.body()["error"] == {
        "message": "max_tokens=101 cannot be greater than max_model_len=100. Please request fewer output tokens. "
        "(parameter=max_tokens, value=101)",
        "type": "BadRequestError",
        "code": 400,
        "param": "max_tokens",
    }
    found = excess(PromptSize(text="x" * 501), 100, 5)
    assert found is not None
    assert found.message == (
        "This model's maximum context length is 100 tokens. However, your prompt contains at least 501 characters "
        "(more than 500 characters, which is the upper bound for 100 input tokens). Please reduce the "
        "length of the input prompt. (parameter=input_text, value=501)"
    )
    assert excess(PromptSize(tokens=101), 100, 5) is not None
    assert excess(PromptSize(text="x" * 500, tokens=100, limit=100), 100, 5) is None


@pytest.mark.parametrize(
    ("path", "body", "seams", "special"),
    [
        (COMPLETION, {"prompt": "a"}, 0, True),
        (COMPLETION, {"prompt": "a", "add_special_tokens": True}, 0, True),
        (COMPLETION, {"prompt": "a", "add_special_tokens": False}, 0, False),
        (COMPLETION, {"prompt": "a", "add_special_tokens": 0}, 0, False),
        (CHAT, {"messages": [USER]}, 2, False),
        (CHAT, {"messages": user({"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"})}, 3, False),
        (RESPONSES, {"input": "a"}, 2, False),
    ],
)
def test_where_the_text_meets_other_text(path: bytes, body: dict[str, Any], seams: int, special: bool) -> None:
    """A completion's prompt is the text itself, with the tokenizer's special tokens."""
    found = prompt_size(path, json.dumps(body).encode())
    assert (found.seams, found.special) == (seams, special)


def put_in_hub_cache(hub: Path, name: str, files: dict[str, object]) -> Path:
    snapshot = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "1234"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("1234", encoding="utf-8")
    for file, content in files.items():
        (snapshot / file).write_text(json.dumps(content), encoding="utf-8")
    return snapshot


PLAIN = {"model": {"vocab": {"a": 0, "abc": 1}}}


@pytest.mark.parametrize(
    ("tokenizer", "config", "longest"),
    [
        ({**PLAIN, "added_tokens": [{"content": "<pad>"}]}, {}, 5),
        (PLAIN, {"eos_token": "<end>", "added_tokens_decoder": {"7": {"content": "<begin>"}}}, 7),
        ({"model": {"vocab": [["a", -1.5], ["abcd", 0.0]]}}, {}, 4),
    ],
)
def test_longest_token_of_a_local_tokenizer(tokenizer: object, config: object, longest: int, tmp_path: Path) -> None:
    """In a directory, and in the hub's cache."""
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    snapshot = put_in_hub_cache(tmp_path / "hub", "org/m", files)
    for found in (local_tokenizer(str(snapshot), {}), local_tokenizer("org/m", {"HF_HOME": str(tmp_path)})):
        assert found is not None
        assert found.longest_token == longest


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": {"model": {"vocab": {}}}},
        {"tokenizer.json": {"model": 1}},
        {"tokenizer.json": []},
        {"tokenizer.json": PLAIN, "tokenizer_config.json": []},
        {"tokenizer.json": PLAIN, "tokenizer_config.json": {"auto_map": 1}},
        {"tokenizer.json": PLAIN, "tokenizer_config.json": {"extra_special_tokens": 1}},
        # The engine may use another one.
        {"tokenizer.json": PLAIN, "tekken.json": {}},
        {"tokenizer.json": PLAIN, "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}},
    ],
)
def test_tokenizer_that_is_not_used(files: dict[str, object], tmp_path: Path) -> None:
    assert local_tokenizer(str(put_in_hub_cache(tmp_path, "m", files)), {}) is None


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_file_is_told_once(broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, object] = {"tokenizer.json": PLAIN, "tokenizer_config.json": {}}
    directory = put_in_hub_cache(tmp_path, "m", files)
    (directory / broken).write_text("{ no JSON", encoding="utf-8")
    for _ in range(2):
        assert local_tokenizer(str(directory), {}) is None
    (told,) = caplog.records
    assert str(directory) in told.getMessage()


@pytest.mark.parametrize("source", ["", "/nowhere", "org/m", "\0", "../../etc"])
def test_without_a_local_tokenizer(source: str, tmp_path: Path) -> None:
    assert local_tokenizer(source, {"HF_HUB_CACHE": str(tmp_path)}) is None
