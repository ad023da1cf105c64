"""The limits that several cortexes share: over requests, kills and failures, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection

import pytest

from cortex.accounts.database.database import open_database
from cortex.accounts.database.limit_states import LimitStates, LockedStates
from cortex.accounts.database.source import DatabaseError, database_source
from cortex.accounts.limits import shared_limiter
from cortex.accounts.limits.exceeded import LimitExceeded
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.shared_limiter import SharedLimiter
from cortex.accounts.limits.terms import UNLIMITED, Grant, KeyLimits, Limits, TokenBound
from shared.errors import ServiceError
from shared.protocol import ErrorCode
from tests.cortex.accounts.limits.owners import ALICE, BOB, DAY, SMALL, terms


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


class LosesAnswers(LimitStates):
    """Commits, but the connection is lost before the answer comes, so often."""

    times = 0

    @contextlib.asynccontextmanager
    async def locked(self, scopes: Collection[str]) -> AsyncIterator[LockedStates]:
        async with super().locked(scopes) as rows:
            yield rows
        if self.times:
            self.times -= 1
            raise DatabaseError("connection lost")


async def test_a_commit_whose_answer_is_lost_is_charged_once(url: str) -> None:
    """What ended before is charged by one transaction, also if the answers to two are lost."""
    cortex = Cortex(url, terms(), {"a": KeyLimits(Limits(budgets=(DAY,)))})
    async with cortex as limiter:
        await cortex.kill()  # each batch is made here
        limiter._states = states = LosesAnswers(cortex.database)

        async def admitted(bound: TokenBound) -> Grant:
            task = asyncio.create_task(limiter.admission(ALICE, "org/m", bound))
            await asyncio.sleep(0)
            await limiter._batch()
            return await task

        first, second = await admitted(TokenBound(30, 0)), await admitted(TokenBound(20, 0))
        limiter.settle(first, 30, 0, 0)
        states.times = 2
        await limiter._batch()
        limiter.settle(second, 20, 0, 0)
        await limiter._batch()
        await limiter._batch()
        third = await admitted(TokenBound(50, 0))
        with pytest.raises(LimitExceeded, match="budget"):
            await admitted(TokenBound(1, 0))
        limiter.settle(third, 50, 0, 0)


async def test_a_cortex_with_older_keys_keeps_what_newer_ones_have_used(url: str) -> None:
    """While a file of keys is rolled out, both admit requests of the key."""
    older, newer = {"a": KeyLimits(Limits(parallel=9))}, {"a": KeyLimits(Limits(parallel=9, budgets=(DAY,)))}
    async with Cortex(url, terms(), older) as old, Cortex(url, terms(), newer) as new:
        new.settle(await new.admission(ALICE, "org/m", TokenBound(60, 0)), 60, 0, 0)
        await new.admission(ALICE, "org/m", TokenBound(0, 0))  # what was settled is in the database
        old.settle(await old.admission(ALICE, "org/m", SMALL), 1, 1, 0)
        await old.admission(ALICE, "org/m", TokenBound(0, 0))
        with pytest.raises(LimitExceeded, match="budget"):
            await new.admission(ALICE, "org/m", TokenBound(50, 0))
        await new.admission(ALICE, "org/m", TokenBound(40, 0))


async def test_an_estimate_charges_at_most_what_was_reserved(url: str) -> None:
    async with Cortex(url, terms(), {"a": KeyLimits(Limits(budgets=(DAY,)))}) as limiter:
        limiter.settle_estimate(await limiter.admission(ALICE, "org/m", SMALL), 5000, 10, 0)
        limiter.settle_estimate(await limiter.admission(ALICE, "org/m", SMALL), 1, 1, 0)
        await limiter.admission(ALICE, "org/m", TokenBound(78, 0))
        with pytest.raises(LimitExceeded, match="budget"):
            await limiter.admission(ALICE, "org/m", TokenBound(1, 0))
