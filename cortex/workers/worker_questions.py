"""What one worker asks of the control besides routes and grants."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from cortex.accounts.sign_in.person import People
from cortex.routing.control import Control
from cortex.routing.response_owners import ResponseMaker
from cortex.workers.messages import (
    AskEngine,
    AskEngineEnd,
    AskMaker,
    AskPerson,
    AskProspect,
    EngineEnd,
    EngineFound,
    MakerFound,
    PersonFound,
    ProspectFound,
    error_to_wire,
)
from shared.errors import ServiceError, internal_error
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

MAKER_TOLD_SECS = 0.2
"""How long a worker may take to tell who made a response whose id its client already has: it tells right after it has
passed on the id. An id that no worker tells within this time is unknown."""

Question: TypeAlias = AskProspect | AskEngine | AskEngineEnd | AskMaker | AskPerson
_Answer: TypeAlias = ProspectFound | EngineFound | EngineEnd | MakerFound | PersonFound


class WorkerQuestions:
    """Answers each of the worker's questions, with an error if it must."""

    def __init__(self, control: Control, people: People | None, send: Callable[[Any], None], tasks: TaskSet) -> None:
        """`people`: knows those that sign in; None without `[auth.oidc]`."""
        self._control = control
        self._people = people
        self._send = send
        self._tasks = tasks

    def receive(self, question: Question) -> None:
        _task = self._tasks.spawn(self._answer(question), name="worker's question")

    async def _answer(self, question: Question) -> None:
        try:
            self._send(await self._answer_to(question))
        except ServiceError as error:
            self._send(error_to_wire(question.number, error))
        except Exception:
            log.exception("bug while answering %s", type(question).__name__)
            self._send(error_to_wire(question.number, internal_error()))

    async def _answer_to(self, question: Question) -> _Answer:
        match question:
            case AskProspect(number, model_id):
                return ProspectFound(number, await self._control.prospect(model_id))
            case AskEngine(number, key):
                return EngineFound(number, await self._control.engine(key))
            case AskEngineEnd(number, replica):
                return EngineEnd(number, await self._control.engine_end(replica))
            case AskMaker(number, response_id):
                return MakerFound(number, await self._maker(response_id))
            case AskPerson(number, credential):
                assert self._people is not None
                return PersonFound(number, await self._people.identify(credential))

    async def _maker(self, response_id: str) -> ResponseMaker | None:
        owners, told = self._control.response_owners, asyncio.Event()

        def notice(added: str) -> None:
            if added == response_id:
                told.set()

        unsubscribe = owners.additions.subscribe(notice)
        try:
            if owners.find(response_id) is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    async with timeout(MAKER_TOLD_SECS):
                        await told.wait()
            return owners.find(response_id)
        finally:
            unsubscribe()
