"""The last lines of an output, in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice


class LineRing:
    """At most `max_lines` lines and `max_chars` characters together; a longer line than that is kept alone."""

    def __init__(self, *, max_lines: int, max_chars: int) -> None:
        self._max_lines = max_lines
        self._max_chars = max_chars
        self._lines: deque[str] = deque()
        self._chars = 0
        self.dropped = False
        """Whether there were more lines than it holds."""

    def __len__(self) -> int:
        return len(self._lines)

    def extend(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._lines.append(line)
            self._chars += len(line)
            while len(self._lines) > self._max_lines or (self._chars > self._max_chars and len(self._lines) > 1):
                self._chars -= len(self._lines.popleft())
                self.dropped = True

    def tail(self, lines: int) -> list[str]:
        """The last `lines` of them, or all."""
        return list(islice(self._lines, max(len(self._lines) - lines, 0), None))
