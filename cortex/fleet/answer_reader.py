"""Reads the answers of one neuron, reports the fields that had to be left out, and reuses what has not changed."""

from __future__ import annotations

import logging
import re
import time
from typing import Any, NamedTuple, TypeVar

from shared.protocol import NeuronHealth, read_answer

log = logging.getLogger(__name__)

UPTIME_SLACK_SECS = 1.0
"""How far a neuron's uptime may drift from its expected value and still count as unchanged."""

_UPTIME = re.compile(rb'"uptime_secs"\s*:\s*([0-9]+(?:\.[0-9]+)?)')
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


class KnownHealth(NamedTuple):
    """The last answer of `/health`: its bytes without the uptime, the neuron's start by that answer (monotonic), and
    the parsed result."""

    body: bytes
    started: float
    data: Any
    health: NeuronHealth

    @classmethod
    def of(cls, body: bytes, data: Any, health: NeuronHealth) -> KnownHealth:
        """What was parsed of this answer."""
        rest, started = _without_uptime(body)
        return cls(rest, started, data, health)

    def is_like(self, body: bytes) -> bool:
        """Whether only the uptime differs in this answer, and as expected."""
        rest, started = _without_uptime(body)
        return self.body == rest and abs(self.started - started) < UPTIME_SLACK_SECS

    def reused_in(self, data: Any) -> Any:
        """The data of another answer, with unchanged entries replaced by the objects already parsed from them."""
        if not isinstance(data, dict) or not isinstance(self.data, dict):
            return data
        kept = {}
        for name, made in (("devices", self.health.devices), ("models", self.health.models)):
            new, old = data.get(name), self.data.get(name)
            if isinstance(new, list) and isinstance(old, list) and len(new) == len(old) == len(made):
                kept[name] = [
                    entry if entry != before else then for entry, before, then in zip(new, old, made, strict=True)
                ]
        return {**data, **kept}


def _without_uptime(body: bytes) -> tuple[bytes, float]:
    """An answer of `/health` without the uptime, and when the neuron started by it (monotonic); 0 if it does not
    say."""
    uptime = _UPTIME.search(body)
    if uptime is None:
        return body, 0.0
    return body[: uptime.start(1)] + body[uptime.end(1) :], time.monotonic() - float(uptime[1])
