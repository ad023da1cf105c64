"""Leases on loads: which of several cortexes may load a model now, anywhere in the fleet. Only cortexes heed them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import Unavailable
from shared.protocol import LEASE_SECS, LeaseCommand, LeaseReply

MAX_LEASES = 10_000
"""A lease takes about a KiB at most."""
REMEMBERED_SECS = 5.0
"""How long the end of a lease is remembered: another cortex may not have heard yet what was loaded under it."""


@dataclass
class _Lease:
    holder: str
    node: str
    until: float  # monotonic


class LeaseTable:
    """By model id. Times are on `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[str, _Lease] = {}

    def apply(self, command: LeaseCommand) -> LeaseReply:
        """Gives, renews or ends a lease.

        Raises:
            Unavailable: MAX_LEASES are in use.
        """
        now, known = self._clock(), self._leases.get(command.model_id)
        others = known is not None and known.holder != command.holder
        if command.node is None:
            if known is not None and not others:
                known.until = min(known.until, now)
            return LeaseReply(granted=False)
        if known is not None and others and known.until > now:
            return LeaseReply(granted=False, node=known.node)
        if known is None and len(self._leases) >= MAX_LEASES:
            self._forget(now)
        self._leases[command.model_id] = _Lease(command.holder, command.node, now + LEASE_SECS)
        recent = known is not None and others and known.until + REMEMBERED_SECS > now
        return LeaseReply(granted=True, node=known.node if known is not None and recent else None)

    def _forget(self, now: float) -> None:
        self._leases = {model: lease for model, lease in self._leases.items() if lease.until + REMEMBERED_SECS > now}
        if len(self._leases) >= MAX_LEASES:
            raise Unavailable("too many leases on loads", retry_after=LEASE_SECS)
