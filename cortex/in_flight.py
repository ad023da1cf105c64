"""Requests that are being worked on, by model and neuron."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator


class InFlight:
    """Counts exactly: a request is in it from the choice of its neuron to the last byte of its answer."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, model_id: str, node: str) -> int:
        return self._counts.get((model_id, node), 0)

    @contextlib.contextmanager
    def counted(self, model_id: str, node: str) -> Iterator[None]:
        """Counts one request inside the body."""
        key = (model_id, node)
        self._counts[key] += 1
        try:
            yield
        finally:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]

    def all(self) -> dict[tuple[str, str], int]:
        """(model id, node) -> count, without zeros."""
        return dict(self._counts)
