"""How much context the engines that this cortex loaded have served: what the next load of the same will serve."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, NamedTuple

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import Fleet, NodeRemoved
from cortex.placement.feasibility import possible_nodes
from cortex.routing.replica import ReplicaKey
from shared.protocol.context_length import AUTO
from shared.tasks import TaskSet, timeout

REPORTED_SECS: Final = 10.0
"""How long a neuron may take to report the context of an engine that has just loaded."""


class _Served(NamedTuple):
    """What an engine of one `choice` served. `process` is its neuron's, which reads its own configuration once."""

    process: str | None
    choice: ModelProfile
    tokens: int


class ServedContexts:
    """Single owner of what is known. Only loads of this cortex count: what others asked for is not known."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._known: dict[tuple[str, str], _Served] = {}  # by node and `ModelProfile.requested`
        self._tasks = TaskSet()

    def loaded(self, key: ReplicaKey, choice: ModelProfile) -> None:
        """This cortex has just loaded the engine as `choice`, one of the `choices` of its model, says."""
        if choice.max_model_len != AUTO:  # that depends on the devices
            _task = self._tasks.spawn(self._learn(key, choice), name=f"context of {key.name}")

    def longest(self, choice: ModelProfile) -> int | None:
        """The most tokens that an engine like this can serve, wherever it is loaded next; None if that is not known of
        each neuron that could load it."""
        fleet = self._fleet.snapshot()
        lengths = [self._of(choice, node) for node in possible_nodes(choice, fleet)]
        known = [length for length in lengths if length is not None]
        return max(known) if known and len(known) == len(lengths) else None

    async def close(self) -> None:
        await self._tasks.close()

    def _of(self, choice: ModelProfile, node: NodeSnapshot) -> int | None:
        served = self._known.get((node.name, choice.requested.name))
        if served is None or served.process != node.instance_id or served.choice != choice:
            return None
        return served.tokens

    async def _learn(self, key: ReplicaKey, choice: ModelProfile) -> None:
        def reported(node: NodeSnapshot) -> bool:
            view = node.view(key.model_id, key.instance)
            return view is None or not view.loaded or view.max_model_len is not None

        with contextlib.suppress(asyncio.TimeoutError, NodeRemoved):
            async with timeout(REPORTED_SECS):
                node = await self._fleet.until(key.node, reported)
            view = node.view(key.model_id, key.instance)
            if view is not None and view.loaded and view.max_model_len is not None:
                served = _Served(node.instance_id, choice, view.max_model_len)
                self._known[node.name, choice.requested.name] = served
