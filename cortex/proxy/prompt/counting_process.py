"""Counts tokens with the package `tokenizers`: a process of its own, because the package lets no other thread run while
it reads a tokenizer or encodes a text.

Started by `token_counter`. Reads a `CountRequest` per line of its input and answers each with a line; ends with its
input, or after some time without a request, which frees the memory of its tokenizers.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec

from cortex.proxy.prompt.local_tokenizer import LocalTokenizer

IDLE_SECS: Final = 60.0
NICENESS: Final = 10
"""It gives way to requests that are being passed on."""
TOKENIZERS: Final = 3
"""How many it keeps. One can take 200 MB."""

PIECE_CHARS: Final = 1 << 18
"""A longer text is counted piece by piece, and no further than it must be."""
SEAM_TOKENS: Final[Mapping[str, int]] = {"BPE": 8, "WordLevel": 8}
"""By the kind of a tokenizer: so many tokens fewer than two texts have apart they may have once joined, because the
words at the seam become one, or are split in another way. Trials with random vocabularies never found more than 3."""
OTHER_SEAM_TOKENS: Final = 128
"""WordPiece makes one token of a word of more than 100 characters; Unigram may split much of one in another way."""


class CountRequest(msgspec.Struct):
    """The fields of a `PromptSize`, and the context in tokens."""

    tokenizer: LocalTokenizer
    text: str
    seams: int
    special: bool
    context: int


class CountReply(msgspec.Struct):
    """`tokens` is exact, or at least so many; or `error` says why the tokenizer cannot be used."""

    tokens: int = 0
    at_least: bool = False
    error: str = ""


def count_tokens(request: CountRequest) -> CountReply:
    """What the text certainly contributes to the prompt.

    Raises:
        Exception: of any kind, by the package; the tokenizer cannot be used.
    """
    tokenizer, special = _load(request.tokenizer)
    seam = SEAM_TOKENS.get(type(tokenizer.model).__name__, OTHER_SEAM_TOKENS)
    text, context = request.text, request.context
    special *= request.special
    found, cuts = special, 0
    while True:
        start = cuts * PIECE_CHARS
        found += _encoded(tokenizer, text[start : start + PIECE_CHARS])
        if start + PIECE_CHARS >= len(text):
            break
        cuts += 1
        if (enough := found - (request.seams + cuts) * seam) > context:
            return CountReply(enough, at_least=True)
    if cuts and not request.seams and abs(found - context) <= cuts * seam:
        found, cuts = special + _encoded(tokenizer, text), 0
    seams = request.seams + cuts
    return CountReply(max(0, found - seams * seam), at_least=seams > 0)


def _encoded(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=TOKENIZERS)
def _load(local: LocalTokenizer) -> tuple[Any, int]:
    """The tokenizer, as an engine sets it up, and how many special tokens it puts around a prompt."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - optional, and only this process needs it

    tokenizer = Tokenizer.from_file(local.path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([token for token in local.added_tokens if token not in present])
    if getattr(tokenizer.model, "dropout", None):
        raise ValueError("it splits words at random (dropout)")
    special = tokenizer.num_special_tokens_to_add(False)
    return tokenizer, special if local.special_tokens is None else min(special, local.special_tokens)


def _answer(line: bytes) -> CountReply:
    try:
        return count_tokens(msgspec.json.decode(line, type=CountRequest))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of the package is not an Exception
        return CountReply(error=(str(error) or type(error).__name__)[:200])


def main() -> None:
    """Answers until the input ends."""
    os.nice(NICENESS)
    while select.select([sys.stdin.buffer], [], [], IDLE_SECS)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        sys.stdout.buffer.write(msgspec.json.encode(_answer(line)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
