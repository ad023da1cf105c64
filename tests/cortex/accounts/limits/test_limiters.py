"""The owners of limits: over requests, restarts, crashes and several cortexes, on real databases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cortex.accounts.caller import Caller
from cortex.accounts.database.database import Database, open_database
from cortex.accounts.database.limit_states import LimitStates
from cortex.accounts.database.source import database_source
from cortex.accounts.limits import local_limiter, shared_limiter
from cortex.accounts.limits.exceeded import LimitExceeded
from cortex.accounts.limits.limiter import LimitOwner
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.shared_limiter import SharedLimiter
from cortex.accounts.limits.terms import UNLIMITED, Budget, Grant, KeyLimits, Limits, RateState, TokenBound
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from shared.errors import ServiceError
from shared.protocol import ErrorCode
from tests.cortex.raw_http import until

ALICE, BOB = Caller("a", "alice", limited=True), Caller("b", "bob", limited=True)
SMALL = TokenBound(10, 10)
DAY = Budget(100, "tokens", "day")


def terms(**limit: int) -> ModelTermsTable:
    catalogue = Catalogue.model_validate({"models": [{"id": "org/m", "limit": {"context": 1000, **limit}}]})
    return ModelTermsTable(LiveConfig(CortexConfig(), catalogue), lambda _: None)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def refused(limiter: LimitOwner, caller: Caller = ALICE, bound: TokenBound = SMALL) -> LimitExceeded:
    with pytest.raises(LimitExceeded) as caught:
        limiter.admit(caller, "org/m", bound)
    return caught.value


def granted(limiter: LimitOwner, caller: Caller = ALICE, model: str = "org/m", bound: TokenBound = SMALL) -> Grant:
    grant = limiter.admit(caller, model, bound)
    assert grant is not None
    return grant


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
    assert (error.code, error.permanent) == (ErrorCode.INSUFFICIENT_QUOTA, False)
    assert "'bob' has not enough left of its budget of 100 tokens per day" in error.message
    error = refused(limiter, BOB, TokenBound(100, 10))
    assert (error.retry_after, error.permanent) == (None, True)
    assert "lower max_tokens" in error.message


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
    limiter = LocalLimiter(terms(), states, kept=await states.all(), clock=clock)
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
        assert len([record for record in caplog.records if "limits cannot be kept" in record.message]) == 1
        async with database.writing() as connection:
            await connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO limit_states")
        loop = asyncio.create_task(limiter.run())
        await until(lambda: "limits are kept again" in caplog.messages)
        loop.cancel()
        await asyncio.wait([loop])
        # killed here, and started again
        limiter = await local(database, Clock())
        limiter.use_keys(keys)
        assert refused(limiter).code == ErrorCode.RATE_LIMIT_EXCEEDED


class Cortex:
    """A SharedLimiter that runs, as in a cortex."""

    def __init__(self, url: str, table: ModelTermsTable, keys: dict[str, KeyLimits]) -> None:
        self._url, self._table, self._keys = url, table, keys

    async def __aenter__(self) -> SharedLimiter:
        source = database_source(self._url, None)
        assert source is not None
        self.database = await open_database(source)
        self.limiter = SharedLimiter(self._table, LimitStates(self.database))
        self.limiter.use_keys(self._keys)
        self._loop = asyncio.create_task(self.limiter.run())
        return self.limiter

    async def kill(self) -> None:
        self._loop.cancel()
        await asyncio.wait([self._loop])

    async def __aexit__(self, *_: object) -> None:
        killed = self._loop.done()
        await self.kill()
        if not killed:
            await self.limiter.close()
        await self.database.close()


@pytest.fixture
def url(new_postgresql: Callable[[], str]) -> str:
    return new_postgresql()


async def attempts(limiters: list[SharedLimiter], count: int, bound: TokenBound = SMALL) -> list[tuple[int, Grant]]:
    """Of so many at once, those admitted, with the number of their limiter."""
    results = await asyncio.gather(
        *(limiters[i % len(limiters)].admission(ALICE, "org/m", bound) for i in range(count)), return_exceptions=True
    )
    for result in results:
        assert isinstance(result, (Grant, LimitExceeded)), result
    return [(i % len(limiters), result) for i, result in enumerate(results) if isinstance(result, Grant)]


async def test_two_cortexes_together_admit_what_one_would(url: str) -> None:
    keys = {"a": KeyLimits(Limits(parallel=7, budgets=(DAY,)))}
    async with Cortex(url, terms(), keys) as one, Cortex(url, terms(), keys) as two:
        both = [one, two]
        admitted = await attempts(both, 40)
        assert len(admitted) == 5  # of 20 tokens each
        for which, grant in admitted:
            both[which].settle(grant, 5, 5, 0)
        assert len(await attempts(both, 40, TokenBound(1, 1))) == 7
        assert await attempts(both, 10, TokenBound(1, 0)) == []


async def test_requests_of_a_killed_cortex_stop_counting_and_its_tokens_count_as_used(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_limiter, "DEAD_SECS", 0.5)
    monkeypatch.setattr(shared_limiter, "SIGN_OF_LIFE_SECS", 0.1)
    keys = {"a": KeyLimits(Limits(parallel=2, budgets=(DAY,)))}
    one, two = Cortex(url, terms(), keys), Cortex(url, terms(), keys)
    async with one as first, two as second:
        assert len(await attempts([first], 3, TokenBound(30, 0))) == 2
        await one.kill()
        admitted: list[tuple[int, Grant]] = []
        while not admitted:  # until the first counts as dead
            admitted = await attempts([second], 3, TokenBound(20, 0))
        assert len(admitted) == 2  # 60 of 100 tokens count as used
        with pytest.raises(LimitExceeded, match="parallel"):
            await second.admission(ALICE, "org/m", TokenBound(0, 0))


async def test_a_cortex_that_stops_leaves_what_was_used(url: str) -> None:
    keys = {"a": KeyLimits(Limits(rpm=10, parallel=1, budgets=(DAY,)))}
    async with Cortex(url, terms(), keys) as one:
        one.settle(await one.admission(ALICE, "org/m", SMALL), 10, 5, 0)
        await one.admission(ALICE, "org/m", SMALL)
    async with Cortex(url, terms(), keys) as two:
        grant = await two.admission(ALICE, "org/m", TokenBound(65, 0))
        assert grant.rates.requests_remaining == 7
        two.settle(grant, 65, 0, 0)
        with pytest.raises(LimitExceeded, match="budget"):
            await two.admission(ALICE, "org/m", TokenBound(1, 0))


async def test_a_cancelled_request_gives_back_what_it_got(url: str) -> None:
    async with Cortex(url, terms(), {"a": KeyLimits(Limits(parallel=1))}) as limiter:
        for _ in range(5):
            task = asyncio.create_task(limiter.admission(ALICE, "org/m", SMALL))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        limiter.settle(await limiter.admission(ALICE, "org/m", SMALL), 0, 0, 0)


async def test_a_request_that_is_cancelled_as_it_is_admitted_keeps_nothing(url: str) -> None:
    """The client leaves after the database has answered and before the request goes on."""
    cortex = Cortex(url, terms(), {"a": KeyLimits(Limits(parallel=1))})
    async with cortex as limiter:
        await cortex.kill()  # each batch is made here
        for _ in range(2):
            task = asyncio.create_task(limiter.admission(ALICE, "org/m", SMALL))
            await asyncio.sleep(0)
            await limiter._batch()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        task = asyncio.create_task(limiter.admission(ALICE, "org/m", SMALL))
        await asyncio.sleep(0)
        await limiter._batch()
        assert (await task).number


async def test_without_the_database_limited_requests_are_refused_until_it_is_back(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shared_limiter, "SIGN_OF_LIFE_SECS", 0.05)
    broken = Cortex(url, terms(), {"a": KeyLimits(Limits(parallel=1))})
    async with broken as limiter:
        grant = await limiter.admission(ALICE, "org/m", SMALL)
        async with broken.database.writing() as connection:
            await connection.exec_driver_sql("ALTER TABLE limit_states RENAME TO elsewhere")
        limiter.settle(grant, 1, 1, 0)  # is not lost
        with pytest.raises(ServiceError, match="cannot be checked") as caught:
            await limiter.admission(ALICE, "org/m", SMALL)
        assert (caught.value.status, caught.value.retry_after) == (503, 2)
        assert caught.value.code == ErrorCode.DATABASE_UNAVAILABLE
        assert await limiter.admission(BOB, "org/m", SMALL) == UNLIMITED
        async with broken.database.writing() as connection:
            await connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO limit_states")
        while True:
            with contextlib.suppress(ServiceError):
                await limiter.admission(ALICE, "org/m", SMALL)
                break
        assert caplog.messages.count("limits can be checked again") == 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(parallel=1), "limit of 1 parallel request;"),
        (Limits(rpm=1), "limit of 1 request per minute;"),
        (Limits(tpm=2_000_000), "limit of 2000000 tokens per minute: this request may use up to 1500000 tokens, by"),
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
