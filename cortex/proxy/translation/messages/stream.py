"""A stream of chat completions as the events of Anthropic's Messages API. Pure."""

from __future__ import annotations

from typing import Any

from cortex.proxy.answers.error_event import engine_error_event, error_event
from cortex.proxy.translation.chat_answer import (
    UNFINISHED,
    ChatCalls,
    abort_message,
    choice_of,
    finish_reason_of,
    reasoning_of,
    said_in,
)
from cortex.proxy.translation.chat_stream import ChatEvent, ChatStreamReader
from cortex.proxy.translation.interface import Json, event, to_json
from cortex.proxy.translation.messages.answer import (
    ClientSettings,
    anthropic_id,
    ending_of,
    new_message,
    text_in,
    usage_of,
)
from shared.errors import UpstreamError
from shared.protocol import ErrorCode

_PATH = b"/v1/messages"


class MessageStream:
    """Implements `interface.StreamTranslation`.

    Anthropic's blocks come one after the other, while the parts of a chat may alternate. The first tool call is passed
    on as it comes; what comes beside it, further calls and text, waits for the finish reason.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._reader = ChatStreamReader()
        self._out: list[bytes] = []
        self._message_id = ""  # until the first chunk
        self._open = ""  # type of the open block
        self._blocks = 0  # so far, with the open one
        self._calls = ChatCalls()
        self._late_text: list[str] = []  # that came while a call was open
        self._last: Json | None = None  # the choice with the finish reason
        self._usage: Any = None
        self._choices = 0  # so far
        self._ended = False

    def feed(self, data: bytes) -> bytes:
        for found in self._reader.feed(data):
            self._take(found)
        return self._taken()

    def finish(self) -> bytes:
        for found in self._reader.finish():
            self._take(found)
        self._end()
        return self._taken()

    def _taken(self) -> bytes:
        out, self._out = self._out, []
        return b"".join(out)

    def _send(self, name: str, **fields: Any) -> None:
        self._out.append(event(name, {"type": name, **fields}))

    def _take(self, found: ChatEvent) -> None:
        if self._ended:
            return
        if found.kind == "chunk":
            self._take_chunk(found.data)
        elif found.kind == "done":
            self._end(done=True)
        else:
            self._fail(found)

    def _take_chunk(self, chunk: Json) -> None:
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        if not self._message_id:
            self._message_id = anthropic_id("msg", chunk.get("id"))
            message = new_message(self._message_id, str(chunk.get("model") or self._settings.model))
            message["usage"] = usage_of(self._usage)
            self._send("message_start", message=message)
        choice = choice_of(chunk)
        if choice is None or self._last is not None:
            return
        self._choices += 1
        self._take_choice(choice)
        reason = finish_reason_of(choice)
        aborted = abort_message(reason)
        if aborted is not None:
            self._fail(ChatEvent("error", {}, aborted))
        elif reason is not None:
            self._last = choice
            self._complete()

    def _take_choice(self, choice: Json) -> None:
        said = said_in(choice) or {}
        thought = reasoning_of(said)
        if thought and self._settings.thinks and self._open != "tool_use":
            self._open_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self._send_delta("thinking_delta", thinking=thought)
        text = text_in(said)
        if text:
            if self._open == "tool_use":
                self._late_text.append(text)
            else:
                self._send_text(text)
        for call in self._calls.take(choice):
            if call is self._calls.found[0] and call.name:
                self._send_call(0)

    def _send_text(self, text: str) -> None:
        self._open_block("text", {"type": "text", "text": ""})
        self._send_delta("text_delta", text=text)

    def _send_call(self, number: int) -> None:
        """Sends what is new of a call, which the block for it may begin with."""
        call = self._calls.found[number]
        if self._open != "tool_use":
            tool_id = anthropic_id("toolu", call.call_id, f"{self._message_id}_{number}")
            self._open_block("tool_use", {"type": "tool_use", "id": tool_id, "name": call.name, "input": {}})
        arguments = call.more_arguments()
        if arguments:
            self._send_delta("input_json_delta", partial_json=arguments)

    def _complete(self) -> None:
        """Sends what has waited for the finish reason."""
        for number in range(len(self._calls.found)):
            if number:
                self._close_block()
            self._send_call(number)
        if self._late_text:
            self._send_text("".join(self._late_text))
        self._close_block()

    def _end(self, *, done: bool = False) -> None:
        """`done`: the engine has said `[DONE]`. That ends an answer too, for the engines that give no finish reason."""
        if self._ended:
            return
        self._ended = True
        if self._last is None and done and self._choices and self._calls.complete:
            self._last = {}
            self._complete()
        if self._last is None:
            error = UpstreamError(UNFINISHED, code=ErrorCode.UPSTREAM_LOST)
            self._out.append(error_event(_PATH, error))
            return
        ending = ending_of(self._last, self._settings, called=bool(self._calls.found))
        self._send("message_delta", delta=ending, usage=usage_of(self._usage))
        self._send("message_stop")

    def _fail(self, found: ChatEvent) -> None:
        self._ended = True
        error = found.data.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        if isinstance(error, dict):
            self._out.append(engine_error_event(_PATH, status, to_json(found.data)))
        else:
            self._out.append(error_event(_PATH, UpstreamError(found.message, code=ErrorCode.UPSTREAM_ERROR)))

    def _open_block(self, kind: str, block: Json) -> None:
        """Opens a block unless one of this kind is open."""
        if self._open == kind:
            return
        self._close_block()
        self._open = kind
        self._blocks += 1
        self._send("content_block_start", index=self._blocks - 1, content_block=block)

    def _close_block(self) -> None:
        if self._open:
            self._open = ""
            self._send("content_block_stop", index=self._blocks - 1)

    def _send_delta(self, kind: str, **fields: Any) -> None:
        self._send("content_block_delta", index=self._blocks - 1, delta={"type": kind, **fields})
