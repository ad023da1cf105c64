"""Reads the answers of one neuron, and reports the fields that had to be left out."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from shared.protocol import read_answer

log = logging.getLogger(__name__)

Wanted = TypeVar("Wanted")


class AnswerReader:
    """Reads as `read_answer`. `ignored_fields`: the fields left out of the latest answers, as "/health: models.id"."""

    def __init__(self, neuron: str) -> None:
        self.ignored_fields: tuple[str, ...] = ()
        self._neuron = neuron
        self._ignored: dict[str, frozenset[str]] = {}  # by path of the request; paths without any are missing
        self._logged: set[str] = set()

    def read(self, path: str, wanted: type[Wanted], data: Any, *, partial: bool = False) -> Wanted:
        """The answer to a request. `partial`: it says nothing about fields that earlier answers had.

        Raises:
            ValidationError: it breaks protocol v1.
        """
        answer, left_out = read_answer(wanted, data)
        if left_out or path in self._ignored:
            self._report(path, left_out, partial=partial)
        return answer

    def ignores_fields_of(self, path: str) -> bool:
        """Whether a field was left out of the latest answer to this request."""
        return path in self._ignored

    def _report(self, path: str, left_out: dict[str, str], *, partial: bool) -> None:
        """Logs each field once."""
        for field, reason in left_out.items():
            name = f"{path}: {field}"
            if name not in self._logged:
                self._logged.add(name)
                log.warning("neuron %s: ignored a field of %s: %s", self._neuron, name, reason)
        before = self._ignored.pop(path, frozenset())
        now = frozenset(left_out) | (before if partial else frozenset())
        if now:
            self._ignored[path] = now
        if now != before:
            self.ignored_fields = tuple(
                sorted(f"{at}: {field}" for at, names in self._ignored.items() for field in names)
            )
