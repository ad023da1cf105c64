"""Which paths can be translated, and by what. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cortex.proxy.translation.interface import Translator
from cortex.proxy.translation.messages.token_count import TokenCount
from cortex.proxy.translation.messages.translation import MessagesTranslation
from cortex.proxy.translation.responses.translation import ResponsesTranslation

TRANSLATORS: Final[Mapping[bytes, Translator]] = {
    b"/v1/messages": MessagesTranslation,
    b"/v1/messages/count_tokens": TokenCount,
    b"/v1/responses": ResponsesTranslation,
}
"""Path of a client's POST to what translates it."""
