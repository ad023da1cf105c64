"""Deterministic embeddings from words: texts that share words are close to each other."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Sequence
from functools import lru_cache

_WORD = re.compile(r"\w+")


@lru_cache(maxsize=8192)
def _word_vector(word: str, dims: int) -> tuple[float, ...]:
    """The word's direction; those of two words are nearly orthogonal."""
    digest = hashlib.shake_128(word.encode("utf-8", "replace")).digest(2 * dims)
    return tuple(value / 32768 for value in struct.unpack(f"<{dims}h", digest))


def embed(text: str, dims: int) -> list[float]:
    """The text's unit vector: the normalised sum of its words' directions."""
    words = _WORD.findall(text.lower()) or [""]
    total = [math.fsum(column) for column in zip(*(_word_vector(word, dims) for word in words), strict=True)]
    return normalised(total)


def normalised(vector: Sequence[float]) -> list[float]:
    """The vector scaled to length 1; the zero vector becomes the first axis."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    if length == 0:
        return [1.0, *([0.0] * (len(vector) - 1))]
    return [value / length for value in vector]


def similarity(left: str, right: str, dims: int) -> float:
    """Similarity of two texts, 0 to 1: the cosine, with negative values as 0."""
    cosine = math.fsum(a * b for a, b in zip(embed(left, dims), embed(right, dims), strict=True))
    return min(max(cosine, 0.0), 1.0)
