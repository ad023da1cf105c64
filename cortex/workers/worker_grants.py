"""What one worker's requests have been granted of the limits, as the control sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from cortex.accounts.limits.limiter import LimitOwner
from cortex.accounts.limits.terms import Grant
from cortex.workers.messages import Admit, Admitted, Settle, refused_to_wire
from shared.errors import ServiceError, internal_error
from shared.tasks import TaskSet

log = logging.getLogger(__name__)


class WorkerGrants:
    """Answers the worker's Admit messages, and settles its requests when it dies."""

    def __init__(self, limiter: LimitOwner, send: Callable[[Any], None], tasks: TaskSet) -> None:
        self._limiter = limiter
        self._send = send
        self._tasks = tasks
        self._grants: dict[int, Grant] = {}  # not settled yet, by their numbers

    def receive(self, message: Admit | Settle) -> None:
        if isinstance(message, Admit):
            self._admit(message)
        elif self._grants.pop(message.grant.number, None) is not None:
            settle = self._limiter.settle_estimate if message.estimated else self._limiter.settle
            settle(message.grant, message.prompt, message.completion, message.cached)

    def _admit(self, asked: Admit) -> None:
        try:
            grant = self._limiter.admit(asked.caller, asked.model_id, asked.bound)
        except ServiceError as error:
            self._send(refused_to_wire(asked.number, error))
            return
        if grant is None:
            _task = self._tasks.spawn(self._wait(asked), name="worker's admission")
        else:
            self._admitted(asked.number, grant)

    async def _wait(self, asked: Admit) -> None:
        try:
            grant = await self._limiter.admission(asked.caller, asked.model_id, asked.bound)
        except ServiceError as error:
            self._send(refused_to_wire(asked.number, error))
        except Exception:
            log.exception("bug while admitting a request for %s", asked.model_id)
            self._send(refused_to_wire(asked.number, internal_error()))
        else:
            self._admitted(asked.number, grant)

    def _admitted(self, number: int, grant: Grant) -> None:
        if grant.number:
            self._grants[grant.number] = grant
        self._send(Admitted(number, grant))

    def end(self) -> None:
        """The worker is gone. What its requests have used is unknown."""
        for grant in self._grants.values():
            self._limiter.settle_at_bound(grant)
        self._grants.clear()
