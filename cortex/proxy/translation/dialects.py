"""Which paths can be translated, and by what. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cortex.proxy.translation.interface import Translator
from cortex.proxy.translation.messages.translation import MessagesTranslation, MessageTokenCount
from cortex.proxy.translation.responses.translation import InputTokenCount, ResponsesTranslation, refuse_compaction

TRANSLATORS: Final[Mapping[bytes, Translator]] = {
    b"/v1/messages": MessagesTranslation,
    b"/v1/messages/count_tokens": MessageTokenCount,
    b"/v1/responses": ResponsesTranslation,
    b"/v1/responses/compact": refuse_compaction,
    b"/v1/responses/input_tokens": InputTokenCount,
}
"""Path of a client's POST to what translates it."""
