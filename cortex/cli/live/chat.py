"""`cortex chat`: a quick try of a model."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from cortex.cli.client import LOAD_TIMEOUT_SECS, CallFailed, stream
from cortex.cli.options import credential_for
from shared.terminal.command_line import fail

_HELP = "/quit or Ctrl-D ends, /new begins again, Ctrl-C stops an answer"


def run_chat(url: str, model: str, prompt: str | None, system: str | None) -> int:
    """One answer to `prompt`, or to what stands in a pipe; otherwise a conversation. Exit 1 if a request fails."""
    chat = _Chat(url, model, system)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None:
        try:
            chat.say(prompt)
        except CallFailed as error:
            fail("cortex", error)
        return 0
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


class _Chat:
    def __init__(self, url: str, model: str, system: str | None) -> None:
        self._url = url
        self._model = model
        self._messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str) -> None:
        """Prints the answer as it comes. Ctrl-C stops it. What failed is forgotten. Raises CallFailed."""
        asked = [*self._messages, {"role": "user", "content": text}]
        told, usage, began, first = "", None, time.monotonic(), None
        status = _Status()
        try:
            for chunk in self._chunks(asked, status):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    piece = (choice.get("delta") or {}).get("content") or ""
                    if piece:
                        first = first or time.monotonic()
                        status.clear()
                        sys.stdout.write(piece)
                        sys.stdout.flush()
                        told += piece
        except KeyboardInterrupt:
            status.clear()
            sys.stderr.write("\nstopped")
        finally:
            status.clear()
        sys.stdout.write("\n")
        if sys.stderr.isatty() and usage is not None and first is not None:
            secs = time.monotonic() - first
            speed = f", {usage['completion_tokens'] / secs:.0f} tokens/s" if secs > 0 else ""
            sys.stderr.write(f"({first - began:.1f} s to the first token{speed})\n")
        if told:
            self._messages = [*asked, {"role": "assistant", "content": told}]

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
