"""How the control answers a worker's questions."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cortex.accounts.sign_in.person import People
from cortex.routing.control import Control
from cortex.routing.replica import ReplicaKey
from cortex.routing.response_owners import ResponseMaker, ResponseOwners
from cortex.workers import worker_questions
from cortex.workers.messages import AskEngine, AskMaker, AskPerson, MakerFound, Refused
from cortex.workers.worker_questions import Question, WorkerQuestions
from shared.errors import Unauthorized
from shared.tasks import TaskSet
from tests.cortex.fleets import replica


class _Control:
    def __init__(self) -> None:
        self.response_owners = ResponseOwners()

    async def engine(self, key: ReplicaKey) -> None:
        raise RuntimeError(f"no {key}")


class _People:
    async def identify(self, credential: bytes) -> None:
        raise Unauthorized(f"not {credential!r}") if credential else RuntimeError("broken")


@pytest.mark.parametrize(
    ("question", "status"),
    [
        (AskEngine(7, ReplicaKey("m", "n", "")), 500),
        (AskPerson(7, b""), 500),
        (AskPerson(7, b"token"), 401),
    ],
)
async def test_no_question_is_left_without_an_answer(question: Question, status: int) -> None:
    """A request would wait for it until its client leaves."""
    answers: asyncio.Queue[Any] = asyncio.Queue()
    tasks = TaskSet()
    WorkerQuestions(cast("Control", _Control()), cast("People", _People()), answers.put_nowait, tasks).receive(question)
    answer = await answers.get()
    await tasks.close()
    assert isinstance(answer, Refused)
    assert (answer.number, answer.status) == (7, status)


async def test_a_worker_that_is_slow_to_tell_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client may ask for the response at another worker at once. What is told is answered at once, and an id that
    is not told is unknown after a time."""
    monkeypatch.setattr(worker_questions, "MAKER_TOLD_SECS", 3600.0)
    control, answers, tasks = _Control(), asyncio.Queue[Any](), TaskSet()
    questions = WorkerQuestions(cast("Control", control), None, answers.put_nowait, tasks)
    questions.receive(AskMaker(7, "resp_1"))
    await asyncio.sleep(0)
    maker = ResponseMaker(replica("m", "n", "http://e"), "key")
    control.response_owners.add("resp_2", maker)
    await asyncio.sleep(0)
    assert answers.empty()
    control.response_owners.add("resp_1", maker)
    assert await answers.get() == MakerFound(7, maker)
    monkeypatch.setattr(worker_questions, "MAKER_TOLD_SECS", 0.01)
    questions.receive(AskMaker(8, "resp_3"))
    assert await answers.get() == MakerFound(8, None)
    await tasks.close()
