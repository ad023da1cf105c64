"""The tokenizer: pieces of up to four characters, with ids that turn back into text without a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Up to four ASCII characters or one other character, with the space before it; any other byte (a lone space, a line
# break) alone. Cuts between characters only, so each piece is text by itself. At most five bytes.
_PIECE = re.compile(rb" ?(?:[\x21-\x7f]{1,4}|[\xc0-\xff][\x80-\xbf]*)|[\x00-\xff]")


def pieces(text: str) -> list[str]:
    """The text cut into tokens; joined, they give the text."""
    return [piece.decode() for piece in _PIECE.findall(text.encode("utf-8", "replace"))]


def count(text: str) -> int:
    """The number of tokens in the text."""
    return len(_PIECE.findall(text.encode("utf-8", "replace")))


def token_ids(text: str) -> list[int]:
    """The tokens' ids: the piece's bytes after a leading 1, read as a number below 2**41 (JSON-safe everywhere)."""
    return [int.from_bytes(b"\x01" + piece, "big") for piece in _PIECE.findall(text.encode("utf-8", "replace"))]


def text_of(ids: Iterable[int]) -> str:
    """The text of token ids; an invalid id becomes U+FFFD."""
    parts = [number.to_bytes(max((number.bit_length() + 7) // 8, 1), "big") if number > 0 else b"" for number in ids]
    return b"".join(part[1:] if part[:1] == b"\x01" and len(part) > 1 else b"\xff" for part in parts).decode(
        "utf-8", "replace"
    )
