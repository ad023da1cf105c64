"""One request of Anthropic's Messages API as a chat completion. Pure."""

from __future__ import annotations

from cortex.proxy.translation.fields import wants_stream
from cortex.proxy.translation.interface import CHAT_PATH, StreamTranslation, WholeAnswer, read_object, to_json
from cortex.proxy.translation.lacking import lacks_chats, lacks_path
from cortex.proxy.translation.messages.answer import ClientSettings, error_answer, error_body, message_answer
from cortex.proxy.translation.messages.chat_request import chat_request, prompt_part
from cortex.proxy.translation.messages.stream import MessageStream
from cortex.proxy.translation.token_count import TokenCount


class MessagesTranslation:
    """Implements `interface.Translation`."""

    path = CHAT_PATH

    def __init__(self, body: bytes, engine: str) -> None:
        """Raises as `interface.Translator`."""
        given = read_object(body)
        self.body = to_json(chat_request(given, engine))
        self._engine = engine
        self._streams = wants_stream(given)
        self._settings = ClientSettings.of(given)

    def answer(self, status: int, body: bytes) -> WholeAnswer:
        if status == 200:
            return message_answer(body, self._settings)
        if status in (404, 405) and lacks_path(status, body):
            return WholeAnswer(status, to_json(error_body(status, lacks_chats(self._engine, "/v1/messages"))))
        return error_answer(status, body)

    def stream(self) -> StreamTranslation | None:
        return MessageStream(self._settings) if self._streams else None


class MessageTokenCount(TokenCount):
    """`/v1/messages/count_tokens`."""

    def __init__(self, body: bytes, engine: str) -> None:
        """Raises as `interface.Translator`."""
        super().__init__(prompt_part(read_object(body), engine))

    def answer(self, status: int, body: bytes) -> WholeAnswer:
        found = self.count(status, body)
        return error_answer(status, body) if found is None else WholeAnswer(200, to_json(found))
