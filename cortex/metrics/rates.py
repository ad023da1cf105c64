"""What each model does per second, from two looks at its counters. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from cortex.metrics.counters import Counters

WINDOW_SECS = 10.0
_BAD_REQUEST = 400


class ModelRate(NamedTuple):
    """Of the last WINDOW_SECS. `first_byte_secs`: mean time to the first byte of an answer, None without answers."""

    requests_per_sec: float
    errors_per_sec: float
    prompt_tokens_per_sec: float
    completion_tokens_per_sec: float
    first_byte_secs: float | None


class _Sums(NamedTuple):
    requests: int = 0
    errors: int = 0
    prompt: int = 0
    completion: int = 0
    answers: int = 0
    first_byte_secs: float = 0.0


class Rates:
    """Keeps the looks of the last WINDOW_SECS."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, dict[str, _Sums]]] = deque()

    def look(self, counters: Iterable[Counters], now: float) -> None:
        """`now`: monotonic seconds."""
        sums: dict[str, _Sums] = {}
        for part in counters:
            for (model, _), series in part.items():
                before = sums.get(model, _Sums())
                sums[model] = _Sums(
                    before.requests + sum(series.statuses.values()),
                    before.errors + sum(count for status, count in series.statuses.items() if status >= _BAD_REQUEST),
                    before.prompt + series.tokens.get("prompt", 0),
                    before.completion + series.tokens.get("completion", 0),
                    before.answers + sum(series.first_byte.counts),
                    before.first_byte_secs + series.first_byte.secs,
                )
        if self._looks and now - self._looks[-1][0] > WINDOW_SECS:
            self._looks.clear()  # the mean of hours without a look is not the rate of now
        self._looks.append((now, sums))
        while len(self._looks) > 2 and now - self._looks[1][0] >= WINDOW_SECS:
            self._looks.popleft()

    def rates(self, now: float) -> dict[str, ModelRate]:
        """Of each model that had requests in the window; none if the last look is older. The counts of a worker that
        has just exited may be missing for a moment: no rate is negative."""
        if len(self._looks) < 2 or now - self._looks[-1][0] > WINDOW_SECS:
            return {}
        (since, before), (until, sums) = self._looks[0], self._looks[-1]
        found: dict[str, ModelRate] = {}
        for model, after in sums.items():
            first = before.get(model, _Sums())
            requests, errors, prompt, completion, answers, first_byte_secs = (
                max(0, one - two) for one, two in zip(after, first, strict=True)
            )
            secs = max(until - since, 0.001)
            if requests or completion:
                found[model] = ModelRate(
                    round(requests / secs, 2),
                    round(errors / secs, 2),
                    round(prompt / secs, 1),
                    round(completion / secs, 1),
                    round(first_byte_secs / answers, 3) if answers else None,
                )
        return found
