"""Leases on loads: which of several cortexes may load a model now, anywhere in the fleet. Only cortexes heed them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import Unavailable
from shared.protocol import LEASE_SECS, LeaseCommand, LeaseReply

MAX_LEASES = 10_000
MAX_NODES = 32
"""The latest ones of a lease. A lease takes about 2 KiB, at most 10."""
REMEMBERED_SECS = 5.0
"""How long the end of a lease is remembered: another cortex may not have heard yet what was loaded under it."""


@dataclass
class _Lease:
    holder: str
    nodes: tuple[str, ...]  # where it loads the model, the latest first
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
            return _reply(known, granted=False)
        if known is None and len(self._leases) >= MAX_LEASES:
            self._forget(now)
        recent = known is not None and known.until + REMEMBERED_SECS > now
        before = known.nodes if known is not None and recent and not others else ()
        nodes = (command.node, *(node for node in before if node != command.node))[:MAX_NODES]
        self._leases[command.model_id] = _Lease(command.holder, nodes, now + LEASE_SECS)
        if known is not None and recent and others:
            return _reply(known, granted=True)
        return LeaseReply(granted=True)

    def _forget(self, now: float) -> None:
        self._leases = {model: lease for model, lease in self._leases.items() if lease.until + REMEMBERED_SECS > now}
        if len(self._leases) >= MAX_LEASES:
            raise Unavailable("too many leases on loads", retry_after=LEASE_SECS)


def _reply(lease: _Lease, *, granted: bool) -> LeaseReply:
    return LeaseReply(granted=granted, node=lease.nodes[0], nodes=list(lease.nodes))
