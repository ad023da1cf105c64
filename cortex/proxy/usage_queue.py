"""What requests used, on its way to whoever keeps account."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from cortex.upstream.usage import Usage

MAX_WAITING = 100_000
"""Records between two collections; beyond it the oldest are lost."""


class UsageRecord(msgspec.Struct, frozen=True, gc=False):
    """What one request used."""

    caller: str
    model_id: str
    node: str
    usage: Usage


class UsageQueue:
    """Filled on the request path, emptied elsewhere."""

    def __init__(self) -> None:
        self._records: deque[UsageRecord] = deque(maxlen=MAX_WAITING)

    def put(self, record: UsageRecord) -> None:
        self._records.append(record)

    def taken(self) -> Iterator[UsageRecord]:
        """Everything that waits, taken out."""
        while self._records:
            yield self._records.popleft()
