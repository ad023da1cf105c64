"""`cortex chat`: a quick try of a model."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cortex.cli.client import LOAD_TIMEOUT_SECS, CallFailed, stream
from cortex.cli.options import credential_for
from shared.terminal.command_line import fail

_INTERRUPTED = 130
_HELP = "/quit or Ctrl-D ends, /new begins again, Ctrl-C stops an answer"


def run_chat(url: str, model: str, prompt: str | None, system: str | None, *, as_json: bool = False) -> int:
    """One answer to `prompt`, or to what stands in a pipe; otherwise a conversation. Exit 1 if a request fails, 130 if
    Ctrl-C stops the one answer. `as_json`: the one answer and its figures."""
    chat = _Chat(url, model, system)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None:
        try:
            answer = chat.say(prompt, prints=not as_json)
        except CallFailed as error:
            fail("cortex", error)
        if as_json:
            print(json.dumps({"model": model, **asdict(answer)}))
        return _INTERRUPTED if answer.stopped else 0
    if as_json:
        fail("cortex", "chat --json needs a prompt, as an argument or in a pipe")
    with contextlib.suppress(ImportError):  # for editing and recalling lines
        import readline  # noqa: F401
    sys.stderr.write(f"{model}: {_HELP}\n")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return 0
        if text == "/quit":
            return 0
        if text == "/new":
            chat = _Chat(url, model, system)
        elif text.startswith("/"):
            sys.stderr.write(f"{_HELP}\n")
        elif text:
            try:
                chat.say(text)
            except CallFailed as error:
                sys.stderr.write(f"cortex: {error}\n")


@dataclass
class _Answer:
    """`usage`: as the engine counts, None if it has not. `stopped`: by Ctrl-C."""

    answer: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    first_token_secs: float | None = None
    secs: float = 0.0
    stopped: bool = False


class _Chat:
    def __init__(self, url: str, model: str, system: str | None) -> None:
        self._url = url
        self._model = model
        self._messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str, *, prints: bool = True) -> _Answer:
        """Prints the answer as it comes. Ctrl-C stops it. What failed is forgotten. Raises CallFailed."""
        asked = [*self._messages, {"role": "user", "content": text}]
        answer, status, began = _Answer(), _Status(), time.monotonic()
        try:
            for chunk in self._chunks(asked, status):
                answer.usage = chunk.get("usage") or answer.usage
                for choice in chunk.get("choices", ()):
                    piece = _take(choice, answer)
                    if answer.first_token_secs is None and (piece or answer.reasoning):
                        answer.first_token_secs = time.monotonic() - began
                    if piece and prints:
                        status.clear()
                        sys.stdout.write(piece)
                        sys.stdout.flush()
                    elif answer.reasoning and not answer.answer:
                        status.show("thinking ...")
        except KeyboardInterrupt:
            answer.stopped = True
            status.clear()
            sys.stderr.write("\nstopped")
        finally:
            status.clear()
        answer.secs = time.monotonic() - began
        if prints:
            sys.stdout.write("\n")
            _show_speed(answer)
        if answer.answer:
            self._messages = [*asked, {"role": "assistant", "content": answer.answer}]
        return answer

    def _chunks(self, messages: list[dict[str, str]], status: _Status) -> Iterator[dict[str, Any]]:
        body = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        key = credential_for(self._url)
        for event in stream(
            self._url, "POST", "/v1/chat/completions", api_key=key, timeout_secs=LOAD_TIMEOUT_SECS, body=body
        ):
            if event.comment:
                status.show(event.comment)
            elif event.data == "[DONE]":
                return
            elif event.data:
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise CallFailed(str(chunk["error"].get("message", chunk["error"])))
                yield chunk


def _take(choice: dict[str, Any], answer: _Answer) -> str:
    """Adds to the answer what has come; what of it is to be printed."""
    delta = choice.get("delta") or {}
    piece = str(delta.get("content") or "")
    answer.answer += piece
    answer.reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    return piece


def _show_speed(answer: _Answer) -> None:
    if sys.stderr.isatty() and answer.usage is not None and answer.first_token_secs is not None:
        secs = answer.secs - answer.first_token_secs
        speed = f", {answer.usage['completion_tokens'] / secs:.0f} tokens/s" if secs > 0 else ""
        sys.stderr.write(f"({answer.first_token_secs:.1f} s to the first token{speed})\n")


class _Status:
    """What is being done for the request, on one line of a terminal until the answer comes."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, text: str) -> None:
        if sys.stderr.isatty() and text != "keep-alive":
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._shown = False
