"""How long each phase of a load took, as its neuron tells them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import Fleet, NodeRemoved
from cortex.routing.replica import LoadPhase, ReplicaKey
from shared.tasks import cancel_all

EVICTING: Final = "evicting"
OTHER: Final = "other"
KNOWN: Final = frozenset(
    {
        "waiting",
        "draining",
        "starting",
        "downloading",
        "loading weights",
        "compiling",
        "capturing graphs",
        "warming up",
        "waking",
    }
)
"""What our neurons name. Others may name any number of phases, which all count as OTHER."""


class LoadPhases:
    """The phases of one load, in their order."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: list[tuple[str, float]] = []

    def begin(self, name: str) -> None:
        """The phase begins, and the one before it ends."""
        if not self._begun or self._begun[-1][0] != name:
            self._begun.append((name, self._clock()))

    def ended(self) -> tuple[LoadPhase, ...]:
        """The phases, the last of which ends now."""
        ends = [since for _, since in self._begun[1:]] + [self._clock()] * bool(self._begun)
        return tuple(LoadPhase(name, since, until) for (name, since), until in zip(self._begun, ends, strict=True))

    @contextlib.asynccontextmanager
    async def following(self, fleet: Fleet, key: ReplicaKey) -> AsyncIterator[None]:
        """Follows what the neuron tells of the engine's load inside the body."""
        task = asyncio.create_task(self._follow(fleet, key), name=f"phases of {key.model_id} on {key.name}")
        try:
            yield
        finally:
            await cancel_all([task])

    async def _follow(self, fleet: Fleet, key: ReplicaKey) -> None:
        known: str | None = None

        def changed(node: NodeSnapshot) -> bool:
            return _phase_of(node, key) not in (None, known)

        with contextlib.suppress(NodeRemoved):
            while True:
                known = _phase_of(await fleet.until(key.node, changed), key)
                if known is not None:
                    self.begin(known)


def _phase_of(node: NodeSnapshot, key: ReplicaKey) -> str | None:
    view = node.view(key.model_id, key.instance)
    if view is None or view.progress is None or not (view.coming or view.ending):
        return None
    return view.progress.phase if view.progress.phase in KNOWN else OTHER
