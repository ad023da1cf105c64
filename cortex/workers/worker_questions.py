"""What one worker asks of the control besides routes and grants."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from cortex.accounts.sign_in.person import People
from cortex.routing.control import Control
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
from shared.errors import ServiceError
from shared.tasks import TaskSet

log = logging.getLogger(__name__)

MAKER_TOLD_SECS = 0.2
"""How long a worker may take to tell who made a response whose id its client already has."""

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
            self._send(error_to_wire(question.number, ServiceError("internal error; see cortex's log")))

    async def _answer_to(self, question: Question) -> _Answer:
        match question:
            case AskProspect(number, model_id):
                return ProspectFound(number, await self._control.prospect(model_id))
            case AskEngine(number, key):
                return EngineFound(number, await self._control.engine(key))
            case AskEngineEnd(number, replica):
                return EngineEnd(number, await self._control.engine_end(replica))
            case AskMaker(number, response_id):
                maker = await self._control.response_maker(response_id)
                if maker is None:
                    await asyncio.sleep(MAKER_TOLD_SECS)
                    maker = await self._control.response_maker(response_id)
                return MakerFound(number, maker)
            case AskPerson(number, credential):
                assert self._people is not None
                return PersonFound(number, await self._people.identify(credential))
