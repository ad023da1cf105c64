"""How engines report the usage of a stream whose client did not ask for it. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from cortex.routing.replica import Replica

MAX_ENTRIES: Final = 4096
KEPT_SECS: Final = 60.0
"""After this time an engine that refused the field is asked again: another program may listen at its address."""

_Key = tuple[str, str, str | None]


class StreamUsage:
    """What a worker has learnt of one engine. `fingerprint`: the member that vLLM puts into the usage event instead of
    the events that end a choice, as `,"system_fingerprint":"…"`; None if unknown."""

    __slots__ = ("_refused_at", "fingerprint")

    def __init__(self) -> None:
        self.fingerprint: bytes | None = None
        self._refused_at = 0.0

    def refuse(self, now: float) -> None:
        """The engine does not take `stream_options`. `now`: monotonic seconds."""
        self._refused_at = now

    def refuses(self, now: float) -> bool:
        return self._refused_at > 0.0 and now - self._refused_at < KEPT_SECS


class StreamUsages:
    """One worker's findings. An engine is known by its model, address and key."""

    def __init__(self) -> None:
        self._found: OrderedDict[_Key, StreamUsage] = OrderedDict()

    def of(self, replica: Replica) -> StreamUsage:
        key = _key(replica)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = StreamUsage()
            if len(self._found) > MAX_ENTRIES:
                self._found.popitem(last=False)
        return found

    def forget(self, replica: Replica) -> None:
        """The engine may have changed."""
        self._found.pop(_key(replica), None)


def _key(replica: Replica) -> _Key:
    return replica.model_id, replica.url, replica.api_key
