"""How the control answers a worker that asks for a grant."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from cortex.accounts.caller import Caller
from cortex.accounts.database.limit_states import LimitStates
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.terms import Budget, KeyLimits, Limits, TokenBound
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from cortex.workers.messages import Admit, AdmitRefused, Admitted, Settle
from cortex.workers.worker_grants import WorkerGrants
from shared.tasks import TaskSet


class _BrokenStates:
    async def write(self, states: Mapping[str, Any], now: float) -> None:
        raise RuntimeError(f"{list(states)} at {now}")


async def test_a_bug_in_the_limiter_leaves_no_request_without_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    catalogue = Catalogue.model_validate({"models": [{"id": "org/m"}]})
    table = ModelTermsTable(LiveConfig(CortexConfig(), catalogue), lambda _: None)
    limiter = LocalLimiter(table, cast("LimitStates", _BrokenStates()))
    limiter.use_keys({"a": KeyLimits(Limits(parallel=1))})
    answers: asyncio.Queue[Any] = asyncio.Queue()
    tasks = TaskSet()
    grants = WorkerGrants(limiter, answers.put_nowait, tasks)
    grants.receive(Admit(7, Caller("a", "alice", limited=True), "org/m", TokenBound(1, 1)))
    answer = await answers.get()
    await tasks.close()
    assert isinstance(answer, AdmitRefused)
    assert (answer.number, answer.status) == (7, 500)
    assert "RuntimeError" in caplog.text


async def test_an_estimate_charges_at_most_what_was_reserved() -> None:
    table = ModelTermsTable(LiveConfig(CortexConfig(), Catalogue()), lambda _: None)
    limiter = LocalLimiter(table)
    limiter.use_keys({"a": KeyLimits(Limits(budgets=(Budget(100, "tokens", "day"),)))})
    answers: asyncio.Queue[Any] = asyncio.Queue()
    grants = WorkerGrants(limiter, answers.put_nowait, TaskSet())
    caller = Caller("a", "alice", limited=True)
    grants.receive(Admit(1, caller, "org/m", TokenBound(10, 10)))
    admitted = answers.get_nowait()
    assert isinstance(admitted, Admitted)
    grants.receive(Settle(admitted.grant, 5000, 10, 0, estimated=True))
    for number, tokens in ((2, 80), (3, 1)):
        grants.receive(Admit(number, caller, "org/m", TokenBound(tokens, 0)))
    assert isinstance(answers.get_nowait(), Admitted)
    assert isinstance(answers.get_nowait(), AdmitRefused)
