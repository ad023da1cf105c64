"""Which paths can be translated, and by what. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cortex.proxy.translation.interface import Translation, Translator
from cortex.proxy.translation.messages.token_count import TokenCount
from cortex.proxy.translation.messages.translation import MessagesTranslation
from shared.errors import InvalidRequest


def _no_responses(body: bytes, engine: str) -> Translation:
    raise InvalidRequest(f"{engine} has no /v1/responses: use /v1/chat/completions")


TRANSLATORS: Final[Mapping[bytes, Translator]] = {
    b"/v1/messages": MessagesTranslation,
    b"/v1/messages/count_tokens": TokenCount,
    b"/v1/responses": _no_responses,
}
"""Path of a client's POST to what translates it."""
