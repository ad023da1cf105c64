"""Commands to a neuron whose host may die before it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cortex.fleet.neuron_client import NeuronUnreachable
from cortex.fleet.state import Fleet
from shared.tasks import first_of

Reply = TypeVar("Reply")


async def unless_down(
    fleet: Fleet, name: str, command: Coroutine[Any, Any, Reply], *, give_up: Callable[[], bool] = lambda: True
) -> Reply:
    """What the command returns. Not waited for while the neuron counts as down and `give_up`, which is asked again
    after each missed poll: polls end within seconds, a command may take half an hour.

    Raises:
        NeuronUnreachable: the neuron is down; it may still carry out the command. NodeRemoved: it left the
        configuration. Otherwise as the command.
    """
    sending = asyncio.ensure_future(command)
    down = fleet.until(name, lambda node: not node.healthy and give_up())
    if await first_of({"answered": sending, "down": down}) == "down":
        raise NeuronUnreachable(f"{name} is down: {fleet.node(name).last_error}")
    return sending.result()
