"""The waiting rooms: who gets a seat, and what they hear."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig, WaitingSettings
from cortex.control.admission_queue import AdmissionQueue, Ticket
from cortex.placement.inputs import Waiting
from shared.errors import TooManyRequests, Unavailable


class Clock:
    """Seconds, turned by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rooms:
    """Waiting rooms of models that are all `secs` away."""

    def __init__(self, rooms: AdmissionQueue, secs: float) -> None:
        self.rooms = rooms
        self.secs = secs

    def seat(self, model_id: str) -> contextlib.AbstractContextManager[Ticket]:
        return self.rooms.seat(model_id, lambda _: self.secs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rooms, name)


def _rooms(per_model: int = 2, total: int = 3, retry_after: float = 17.2, clock: Clock | None = None) -> Rooms:
    waiting = WaitingSettings(per_model=per_model, total=total)
    rooms = AdmissionQueue(live=LiveConfig(CortexConfig(waiting=waiting), Catalogue()), clock=clock or Clock())
    return Rooms(rooms, retry_after)


def test_a_full_room_refuses_with_when_to_come_back() -> None:
    """429, from what the load still takes; another model's room has seats."""
    rooms = _rooms()
    with rooms.seat("m"), rooms.seat("m"):
        with pytest.raises(TooManyRequests) as refused, rooms.seat("m"):
            pass
        assert (refused.value.status, refused.value.code, refused.value.retry_after) == (429, "waiting_room_full", 18)
        assert "2 requests are waiting for 'm' already" in refused.value.message
        with rooms.seat("x"):
            assert (rooms.count("m"), rooms.count("x")) == (2, 1)


@pytest.mark.parametrize(("secs", "told"), [(-5.0, 1), (0.0, 1), (0.2, 1), (60.0, 60)])
def test_when_to_come_back_is_never_now(secs: float, told: int) -> None:
    """A load that should have ended already is nearly there."""
    rooms = _rooms(per_model=1, retry_after=secs)
    with rooms.seat("m"), pytest.raises(TooManyRequests) as refused, rooms.seat("m"):
        pass
    assert refused.value.retry_after == told


def test_all_rooms_together_are_bounded() -> None:
    """However few wait for each."""
    rooms = _rooms()
    with rooms.seat("a"), rooms.seat("b"), rooms.seat("c"):
        with pytest.raises(TooManyRequests) as refused, rooms.seat("d"):
            pass
        assert "3 requests are waiting for models already" in refused.value.message
        assert "d" not in rooms.waiting()


def test_a_seat_that_is_given_up_is_the_next_ones() -> None:
    """After an error as well: whoever leaves takes nothing with him."""
    rooms = _rooms(per_model=1, total=1)
    for _ in range(3):
        with pytest.raises(RuntimeError), rooms.seat("m"):
            raise RuntimeError
    with rooms.seat("x"):
        assert list(rooms.models) == ["x"]
    assert (list(rooms.models), rooms.count("m"), rooms.waiting()) == ([], 0, {})


async def test_a_client_that_leaves_gives_up_its_seat() -> None:
    """Its task is cancelled while it waits."""
    rooms = _rooms(per_model=1)

    async def wait() -> None:
        with rooms.seat("m") as seat:
            await seat.news(within_secs=60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert rooms.count("m") == 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert rooms.count("m") == 0


def test_a_room_has_been_waited_in_since_its_first() -> None:
    """As long as somebody is there; an empty room forgets."""
    clock = Clock()
    rooms = _rooms(clock=clock)
    first = rooms.seat("m")
    first.__enter__()
    clock.now += 5
    with rooms.seat("m"):
        assert rooms.waiting() == {"m": Waiting(2, 1000.0)}
        first.__exit__(None, None, None)
        assert rooms.waiting() == {"m": Waiting(1, 1000.0)}
    with rooms.seat("m"):
        assert rooms.waiting() == {"m": Waiting(1, 1005.0)}


async def test_news_wake_all_who_wait_for_the_model() -> None:
    """And nobody else."""
    rooms = _rooms()
    with rooms.seat("m") as one, rooms.seat("m") as two, rooms.seat("x") as other:
        rooms.news("m")
        await one.news(within_secs=1)
        await two.news(within_secs=1)
        with pytest.raises(asyncio.TimeoutError):
            await other.news(within_secs=0.01)


async def test_what_was_told_while_nobody_listened_is_kept() -> None:
    """Once: it is news no more when it has been heard."""
    rooms = _rooms()
    with rooms.seat("m") as seat:
        rooms.news("m")
        await seat.news(within_secs=1)
        with pytest.raises(asyncio.TimeoutError):
            await seat.news(within_secs=0.01)


async def test_a_refusal_reaches_all_who_wait() -> None:
    """Each is told why."""
    rooms = _rooms()

    async def hears(seat: Ticket) -> str | None:
        try:
            await seat.news(within_secs=1)
        except Unavailable as error:
            return error.code
        return None

    with rooms.seat("m") as one, rooms.seat("m") as two, rooms.seat("x") as other:
        rooms.refuse("m", Unavailable("no", code="cold_load_failed", retry_after=3))
        rooms.news("x")
        assert await asyncio.gather(*(map(hears, (one, two, other)))) == ["cold_load_failed", "cold_load_failed", None]


def test_news_for_a_model_that_nobody_waits_for() -> None:
    """Nothing happens."""
    rooms = _rooms()
    rooms.news("m")
    rooms.refuse("m", Unavailable("no", code="cold_load_failed", retry_after=3))
    assert rooms.waiting() == {}
