"""The limits of a cortex that shares them with no other: over requests, restarts and crashes, on a real database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cortex.accounts.database.database import Database, open_database
from cortex.accounts.database.limit_states import LimitStates
from cortex.accounts.database.source import database_source
from cortex.accounts.limits import local_limiter
from cortex.accounts.limits.exceeded import LimitExceeded
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.accounts.limits.opening import kept_states
from cortex.accounts.limits.terms import UNLIMITED, WHOLE_CONTEXT, Budget, KeyLimits, Limits, RateState, TokenBound
from cortex.proxy.body.token_bound import token_bound
from shared.errors import render
from shared.protocol import ErrorCode
from shared.tasks import timeout
from tests.cortex.accounts.limits.owners import ALICE, BOB, DAY, SMALL, Clock, granted, refused, terms
from tests.cortex.raw_http import until


def test_a_refusal_says_which_limit_and_when_to_retry() -> None:
    limiter = LocalLimiter(terms(parallel=3), clock=Clock())
    limiter.use_keys(
        {
            "a": KeyLimits(Limits(rpm=2, budgets=(Budget(5, "EUR", 7200.0),)), {"org/*": Limits(tpm=100)}),
            "b": KeyLimits(Limits(budgets=(DAY,))),
        }
    )
    first, second = granted(limiter), granted(limiter)
    assert second.rates == RateState(2, 0, 60.0, 100, 60, 24.0)
    error = refused(limiter)
    assert (error.status, error.code, error.retry_after) == (429, ErrorCode.RATE_LIMIT_EXCEEDED, 30)
    assert error.message == "API key 'alice' has reached its limit of 2 requests per minute; retry in 30 s"
    assert error.rates == second.rates
    granted(limiter, BOB)
    error = refused(limiter, BOB)
    assert (error.code, error.retry_after) == (ErrorCode.RATE_LIMIT_EXCEEDED, 1)
    assert "model 'org/m', for all API keys together, has reached its limit of 3 parallel requests" in error.message
    limiter.settle(first, 5, 1, 0)
    error = refused(limiter, BOB, TokenBound(90, 10))
    assert error.code == ErrorCode.INSUFFICIENT_QUOTA
    assert "'bob' does not have enough left of its budget of 100 tokens per day" in error.message
    error = refused(limiter, BOB, TokenBound(100, 10))
    assert (error.retry_after, error.permanent) == (None, True)


def test_clients_are_not_to_sit_out_a_long_wait() -> None:
    """Anthropic's package would sleep until the day is over. A minute it waits, as all others do."""
    clock = Clock()
    limiter = LocalLimiter(terms(), clock=clock)
    limiter.use_keys({"b": KeyLimits(Limits(budgets=(DAY,)))})
    limiter.settle(granted(limiter, BOB, bound=TokenBound(90)), 90, 0, 0)
    for left, permanent in ((61.0, True), (60.0, False)):
        clock.now = (clock.now // 86400 + 1) * 86400 - left
        error = refused(limiter, BOB, TokenBound(90))
        assert (error.retry_after, error.permanent) == (left, permanent)
        rendered = render(error, "r", anthropic=True)
        assert json.loads(rendered.body)["error"]["type"] == "rate_limit_error"
        assert rendered.headers.get("x-should-retry") == ("false" if permanent else None)


FIELD = "tokens (max_tokens; in /v1/responses max_output_tokens)"
UNLIMITED_ANSWER = "its prompt and, as it does not limit its answer, the longest one"
LIMITED_ANSWER = "its prompt and the longest answer that it allows"


@pytest.mark.parametrize(
    ("bound", "made_of", "advice"),
    [
        (TokenBound(30, None), UNLIMITED_ANSWER, f"limit the answer to at most 30 {FIELD}"),
        (TokenBound(30, 400, answers=2), LIMITED_ANSWER, f"limit the answer to at most 35 {FIELD}"),
        (TokenBound(100, 10), LIMITED_ANSWER, "shorten the prompt"),
        (TokenBound(120, 0, prompts=2), "its prompt", "send less text at a time"),
        (TokenBound(WHOLE_CONTEXT, None), "the model's whole context", "images, audio, files and earlier responses"),
        (TokenBound(WHOLE_CONTEXT, 0, prompts=2), "its prompt", "no budget admits images, audio or files here"),
    ],
)
def test_a_refusal_says_what_fits(bound: TokenBound, made_of: str, advice: str) -> None:
    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"b": KeyLimits(Limits(budgets=(DAY,)))})
    message = refused(limiter, BOB, bound).message
    assert f"tokens ({made_of}), more than the whole budget of 100 tokens per day; {advice}" in message


@pytest.mark.parametrize(
    ("path", "fields", "limit"),
    [
        ("/v1/chat/completions", {}, "max_tokens"),
        ("/v1/chat/completions", {"max_completion_tokens": 500}, "max_completion_tokens"),
        ("/v1/responses", {}, "max_output_tokens"),
        ("/v1/completions", {"n": 2, "max_tokens": 90}, "max_tokens"),
    ],
)
def test_what_a_refusal_recommends_is_admitted(path: str, fields: dict[str, Any], limit: str) -> None:
    """Although the field makes the body longer, and so its bound."""

    def bound(**more: Any) -> TokenBound:
        return token_bound(path.encode(), json.dumps({"model": "m", **fields, **more}).encode(), "application/json")

    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"b": KeyLimits(Limits(budgets=(DAY,)))})
    found = re.search(r"at most (\d+) tokens", refused(limiter, BOB, bound()).message)
    assert found is not None
    granted(limiter, BOB, bound=bound(**{limit: int(found[1])}))


@pytest.mark.parametrize("limits", [Limits(rpm=0), Limits(parallel=0), Limits(tpm=0)])
def test_a_limit_of_0_admits_nothing(limits: Limits) -> None:
    """And does not tell the client to try again."""
    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"b": KeyLimits(limits)})
    error = refused(limiter, BOB)
    assert (error.permanent, error.retry_after) == (True, None)
    assert "'bob' may send no request (limit: 0 " in error.message


def test_all_scopes_of_a_request_count_it_or_none() -> None:
    limiter = LocalLimiter(terms(rpm=1), clock=Clock())
    limiter.use_keys({"a": KeyLimits(Limits(rpm=3, parallel=2), {"other/*": Limits(parallel=1)})})
    grant = granted(limiter)
    for _ in range(5):
        refused(limiter)
    limiter.settle(grant, 0, 0, 0)
    assert granted(limiter, model="other/x").rates.requests_remaining == 1
    with pytest.raises(LimitExceeded, match="for models 'other/\\*'"):
        limiter.admit(ALICE, "other/y", SMALL)


def test_a_grant_is_settled_once() -> None:
    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"a": KeyLimits(Limits(parallel=1))})
    assert granted(limiter, BOB) == UNLIMITED
    grant = granted(limiter)
    for _ in range(3):
        limiter.settle(grant, 1, 1, 0)
        limiter.settle_at_bound(grant)
        limiter.settle(UNLIMITED, 1, 1, 0)
    granted(limiter)
    refused(limiter)


def test_an_estimate_charges_at_most_what_was_reserved() -> None:
    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"a": KeyLimits(Limits(tpm=100, budgets=(DAY,)))})
    limiter.settle_estimate(granted(limiter), 5000, 10, 0)
    limiter.settle_estimate(granted(limiter), 1, 1, 0)
    assert granted(limiter, bound=TokenBound(78, 0)).rates.tokens_remaining == 0
    refused(limiter, bound=TokenBound(1, 0))


def test_changed_limits_hold_for_the_next_request() -> None:
    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"a": KeyLimits(Limits(rpm=10))})
    for _ in range(5):
        granted(limiter)
    limiter.use_keys({"a": KeyLimits(Limits(rpm=2))})
    for _ in range(2):
        granted(limiter)
    refused(limiter)
    limiter.use_keys({})
    assert granted(limiter) == UNLIMITED


def test_long_names_of_models_are_not_remembered() -> None:
    """They may be as long as a body."""
    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"a": KeyLimits(Limits(rpm=100))})
    for number in range(3):
        granted(limiter, model=f"{number}" * 300)
    granted(limiter)
    assert granted(limiter).rates.requests_remaining == 95  # they count as any other
    assert list(limiter._terms["a"]) == ["org/m"]


@contextlib.asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Database]:
    source = database_source(None, directory)
    assert source is not None
    database = await open_database(source)
    try:
        yield database
    finally:
        await database.close()


async def local(database: Database, clock: Clock) -> LocalLimiter:
    states = LimitStates(database)
    limiter = LocalLimiter(terms(), states, kept=await kept_states(states, clock()), clock=clock)
    limiter.use_keys({"a": KeyLimits(Limits(rpm=10, tpm=1000, budgets=(DAY, Budget(100, "tokens", 600.0))))})
    return limiter


async def test_a_clean_restart_forgets_and_takes_nothing(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path) as database:
        limiter = await local(database, clock)
        limiter.settle(await limiter.admission(ALICE, "org/m", SMALL), 3, 4, 0)
        await limiter.admission(ALICE, "org/m", SMALL)  # ends with cortex: what it used is unknown
        await limiter.close()
        limiter = await local(database, clock)
        grant = await limiter.admission(ALICE, "org/m", TokenBound(70, 3))
        assert grant.rates == RateState(10, 7, 18.0, 1000, 900, 6.0)
        refused(limiter, bound=TokenBound(1, 0))


async def test_a_crash_forgets_nothing(tmp_path: Path) -> None:
    """Whenever it happens: what was used, or may have been, counts afterwards. Only the last percent is lost."""
    clock = Clock()
    async with opened(tmp_path) as database:
        for used in range(1, 6):
            limiter = await local(database, clock)
            with contextlib.suppress(LimitExceeded):
                await limiter.admission(ALICE, "org/m", TokenBound(0, 0))
            clock.now += 60
            grant = await limiter.admission(ALICE, "org/m", TokenBound(7, 3))
            limiter.settle(grant, 4, 3, 0)
            with contextlib.suppress(LimitExceeded):  # unless it has to be written first
                limiter.admit(ALICE, "org/m", TokenBound(1, 0))
            # killed here, and started again a minute later
            clock.now += 60
            limiter = await local(database, clock)
            error = refused(limiter)
            assert error.code == ErrorCode.RATE_LIMIT_EXCEEDED  # what may have been sent just before it was killed
            clock.now += 6
            with pytest.raises(LimitExceeded) as caught:
                await limiter.admission(ALICE, "org/m", TokenBound(101 - 7 * used, 0))
            assert caught.value.code == ErrorCode.INSUFFICIENT_QUOTA
            clock.now += 60


async def test_a_crash_is_charged_to_the_time_before_the_next_start(tmp_path: Path) -> None:
    """Also if the key is used again only after other starts, in windows of then."""
    clock = Clock()
    async with opened(tmp_path) as database:
        await (await local(database, clock)).admission(ALICE, "org/m", TokenBound(90, 0))
        # killed here, and started again twice
        for _ in range(2):
            await (await local(database, clock)).close()
        clock.now += 2 * 86400
        grant = await (await local(database, clock)).admission(ALICE, "org/m", TokenBound(100, 0))
        assert grant.rates == RateState(10, 9, 6.0, 1000, 900, 6.0)


async def test_requests_go_on_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be written is written as soon as that is possible, also without budgets."""
    monkeypatch.setattr(local_limiter, "WRITE_SECS", 0.02)
    keys = {"a": KeyLimits(Limits(rpm=5))}
    caplog.set_level(logging.INFO)
    async with opened(tmp_path) as database:
        limiter = await local(database, Clock())
        limiter.use_keys(keys)
        async with database.writing() as connection:
            await connection.exec_driver_sql("ALTER TABLE limit_states RENAME TO elsewhere")
        for _ in range(3):
            await limiter.admission(ALICE, "org/m", SMALL)
        assert len([record for record in caplog.records if "cannot save limits" in record.message]) == 1
        async with database.writing() as connection:
            await connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO limit_states")
        loop = asyncio.create_task(limiter.run())
        await until(lambda: "limits are saved again" in caplog.messages)
        loop.cancel()
        await asyncio.wait([loop])
        # killed here, and started again
        limiter = await local(database, Clock())
        limiter.use_keys(keys)
        assert refused(limiter).code == ErrorCode.RATE_LIMIT_EXCEEDED


class SlowStates(LimitStates):
    """Each write takes longer than terms are remembered. `writes`: their number."""

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(database)
        self.writes = 0
        self._time = clock

    async def write(self, states: Mapping[str, dict[str, Any]], now: float) -> None:
        self.writes += 1
        self._time.now += 2 * local_limiter.TERMS_SECS
        await super().write(states, now)


async def test_requests_with_budgets_wait_for_one_write_if_the_database_is_locked(tmp_path: Path) -> None:
    """SQLite tells that only after seconds: more than one request may be held up, but not again and again."""
    async with opened(tmp_path) as database:
        clock = Clock()
        states = SlowStates(database, clock)
        limiter = LocalLimiter(terms(), states, clock=clock)
        limiter.use_keys({"a": KeyLimits(Limits(budgets=(DAY,))), "b": KeyLimits(Limits(budgets=(DAY,)))})
        async with database.writing() as connection:
            await connection.exec_driver_sql("ALTER TABLE limit_states RENAME TO elsewhere")
        for caller in (ALICE, BOB, ALICE):
            async with timeout(30):
                await limiter.admission(caller, "org/m", SMALL)
            clock.now += 2 * local_limiter.TERMS_SECS
        granted(limiter)
        assert states.writes == 1
        async with database.writing() as connection:
            await connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO limit_states")
        await limiter.close()
        assert set(await states.all()) == {"key:a", "key:b"}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(parallel=1), "limit of 1 parallel request;"),
        (Limits(rpm=1), "limit of 1 request per minute;"),
        (
            Limits(tpm=2_000_000),
            "limit of 2000000 tokens per minute: this request may use up to 1500000 tokens (",
        ),
        (Limits(budgets=(Budget(2_500_000, "tokens", "day"),)), "budget of 2500000 tokens per day: this"),
    ],
)
async def test_numbers_in_messages(limits: Limits, message: str) -> None:
    """Whole, however large, and one of a thing is singular."""
    limiter = LocalLimiter(terms(), clock=Clock())
    limiter.use_keys({"a": KeyLimits(limits)})
    bound = TokenBound(1_500_000, 0, prompts=1500)
    granted(limiter, bound=bound)
    assert message in refused(limiter, ALICE, bound).message
