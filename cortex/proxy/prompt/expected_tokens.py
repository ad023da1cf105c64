"""How many tokens a waiting request is expected to use, for its caller's turn."""

from __future__ import annotations

from typing import Final

from cortex.http.request import Request
from cortex.proxy.body.token_bound import token_bound

BYTES_PER_TOKEN: Final = 4
UNKNOWN_ANSWER: Final = 256
"""Tokens of an answer whose limit the request does not give."""
LEARNING: Final = 0.2
"""Weight of the last request in the average of its caller."""
MAX_AVERAGES: Final = 10_000


class _Average:
    __slots__ = ("tokens",)

    def __init__(self, tokens: float) -> None:
        self.tokens = tokens


class ExpectedTokens:
    """Owns an average of what the requests of each key to each model have used."""

    def __init__(self) -> None:
        self._averages: dict[tuple[str, str], _Average] = {}

    def learn(self, key_id: str, model_id: str, tokens: int) -> None:
        """A request has used so many tokens, prompt and answer together."""
        key = key_id, model_id
        average = self._averages.get(key)
        if average is not None:
            average.tokens += LEARNING * (tokens - average.tokens)
            return
        if len(self._averages) >= MAX_AVERAGES:
            self._averages.clear()
        self._averages[key] = _Average(float(tokens))

    def of(self, request: Request, key_id: str, model_id: str) -> float:
        """The average; before there is one, what the request's size and limits suggest."""
        average = self._averages.get((key_id, model_id))
        if average is not None:
            return average.tokens
        bound = token_bound(request.path, request.body, request.content_type.decode("latin-1"))
        output = UNKNOWN_ANSWER if bound.output is None else bound.output
        return min(bound.prompt, len(request.body)) / BYTES_PER_TOKEN + bound.answers * output
