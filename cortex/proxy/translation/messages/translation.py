"""One request of Anthropic's Messages API as a chat completion. Pure."""

from __future__ import annotations

from cortex.proxy.translation.interface import CHAT_PATH, StreamTranslation, WholeAnswer, read_object, to_json
from cortex.proxy.translation.messages.answer import ClientSettings, error_answer, message_answer
from cortex.proxy.translation.messages.chat_request import chat_request
from cortex.proxy.translation.messages.stream import MessageStream


class MessagesTranslation:
    """Implements `interface.Translation`."""

    path = CHAT_PATH

    def __init__(self, body: bytes, engine: str) -> None:
        """Raises as `interface.Translator`."""
        given = read_object(body)
        self.body = to_json(chat_request(given, engine))
        self.streams = given.get("stream") is True
        self._settings = ClientSettings.of(given)

    def answer(self, status: int, body: bytes) -> WholeAnswer:
        if status == 200:
            return message_answer(body, self._settings)
        return error_answer(status, body)

    def stream(self) -> StreamTranslation:
        return MessageStream(self._settings)
