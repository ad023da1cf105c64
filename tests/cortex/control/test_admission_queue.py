"""The admission queue: which requests get a ticket, and what they are told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.profile import ModelProfile
from cortex.config.settings import CortexConfig, WaitingSettings
from cortex.control.admission_queue import AdmissionQueue, Ticket
from cortex.placement.inputs import WaitingRequests
from shared.errors import TooManyRequests, Unavailable


class Clock:
    """A manual clock, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Queue:
    """Waiting queue of models that are all `secs` away."""

    def __init__(self, queue: AdmissionQueue, secs: float) -> None:
        self.queue = queue
        self.secs = secs

    def ticket(self, model_id: str) -> contextlib.AbstractContextManager[Ticket]:
        return self.queue.ticket(model_id, lambda _: self.secs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)


def _queue(per_model: int = 2, total: int = 3, retry_after: float = 17.2, clock: Clock | None = None) -> Queue:
    waiting = WaitingSettings(per_model=per_model, total=total)
    queue = AdmissionQueue(live=LiveConfig(CortexConfig(waiting=waiting), Catalogue()), clock=clock or Clock())
    return Queue(queue, retry_after)


def test_a_full_queue_refuses_with_a_retry_delay() -> None:
    """The 429's delay is the rest of the load; the queue of another model has its own limit."""
    queue = _queue()
    with queue.ticket("m"), queue.ticket("m"):
        with pytest.raises(TooManyRequests) as refused, queue.ticket("m"):
            pass
        assert (refused.value.status, refused.value.code, refused.value.retry_after) == (429, "waiting_room_full", 18)
        assert "2 requests are already waiting for 'm'" in refused.value.message
        with queue.ticket("x"):
            assert (queue.count("m"), queue.count("x")) == (2, 1)


@pytest.mark.parametrize(("secs", "told"), [(-5.0, 1), (0.0, 1), (0.2, 1), (60.0, 60)])
def test_the_retry_delay_is_never_zero(secs: float, told: int) -> None:
    """A load that should have ended already will end soon."""
    queue = _queue(per_model=1, retry_after=secs)
    with queue.ticket("m"), pytest.raises(TooManyRequests) as refused, queue.ticket("m"):
        pass
    assert refused.value.retry_after == told


def test_all_queue_together_are_bounded() -> None:
    """The limit on all waiting requests holds even if few wait for each model."""
    queue = _queue()
    with queue.ticket("a"), queue.ticket("b"), queue.ticket("c"):
        with pytest.raises(TooManyRequests) as refused, queue.ticket("d"):
            pass
        assert "3 requests are already waiting for models" in refused.value.message
        assert "d" not in queue.waiting()


def test_a_returned_ticket_is_available_again() -> None:
    """A ticket is released after an error too."""
    queue = _queue(per_model=1, total=1)
    for _ in range(3):
        with pytest.raises(RuntimeError), queue.ticket("m"):
            raise RuntimeError
    with queue.ticket("x"):
        assert list(queue.models) == ["x"]
    assert (list(queue.models), queue.count("m"), queue.waiting()) == ([], 0, {})


async def test_a_client_that_leaves_gives_up_its_ticket() -> None:
    """Its task is cancelled while it waits."""
    queue = _queue(per_model=1)

    async def wait() -> None:
        with queue.ticket("m") as ticket:
            await ticket.wait(within_secs=60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert queue.count("m") == 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert queue.count("m") == 0


async def test_a_place_that_a_served_request_does_not_need_goes_to_the_next() -> None:
    """A request was woken, and once more while it asked for an engine: the second place is for the one behind it."""
    queue = _queue()
    with contextlib.ExitStack() as served, contextlib.ExitStack() as behind:
        first = served.enter_context(queue.ticket("m"))
        second = behind.enter_context(queue.ticket("m"))
        queue.notify_first("m")
        await first.wait(within_secs=1)
        queue.notify_first("m")
        assert not second.notified
        served.close()
        assert second.notified


async def test_requests_for_a_model_and_for_its_variant_take_turns_at_its_engine() -> None:
    """A key with one request for the variant waits behind one of another key for the model, and the other way round.
    A place of another variant is not theirs."""
    model = ModelProfile.model_validate({"id": "m", "variants": [{"quant": "fp8"}, {"quant": "awq"}]})
    live = LiveConfig(CortexConfig(), Catalogue(models=[model]))
    for names in (("m", "m@awq"), ("m@awq", "m")):
        queue = AdmissionQueue(live=live)
        busy, quiet = (Caller(name, name) for name in ("busy", "quiet"))
        with contextlib.ExitStack() as stack:
            many = [stack.enter_context(queue.ticket(names[0], lambda _: 1.0, busy)) for _ in range(9)]
            one = stack.enter_context(queue.ticket(names[1], lambda _: 1.0, quiet))
            queue.notify_first("m@fp8")
            assert not one.notified
            queue.notify_first("m", "m@awq")
            queue.notify_first("m", "m@awq")
            assert [ticket.notified for ticket in (*many[:2], one)] == [True, False, True]
            queue.set_in_line(one, False)  # it leaves its place to the others, whatever their name
            assert [ticket.notified for ticket in many[:3]] == [True, True, False]


async def test_a_request_outside_the_line() -> None:
    """It counts as waiting, but lets others pass: the place that it was woken for goes to the next, and so do later
    ones."""
    queue = _queue()
    with queue.ticket("m") as first, queue.ticket("m") as second:
        queue.notify_first("m")
        assert (first.notified, second.notified) == (True, False)
        queue.set_in_line(first, False)
        await second.wait(within_secs=1)
        await first.wait(within_secs=1)
        queue.notify_first("m")
        assert (first.notified, second.notified) == (False, True)
        queue.set_in_line(second, False)
        assert (queue.has_line("m"), queue.count("m")) == (False, 2)


def test_the_wait_for_a_model_starts_with_its_first_request() -> None:
    """The wait is counted while requests wait; an empty queue resets it."""
    clock = Clock()
    queue = _queue(clock=clock)
    first = queue.ticket("m")
    first.__enter__()
    clock.now += 5
    with queue.ticket("m"):
        assert queue.waiting() == {"m": WaitingRequests(2, 1000.0, frozenset({ANONYMOUS}))}
        first.__exit__(None, None, None)
        assert queue.waiting() == {"m": WaitingRequests(1, 1000.0, frozenset({ANONYMOUS}))}
    with queue.ticket("m"):
        assert queue.waiting() == {"m": WaitingRequests(1, 1005.0, frozenset({ANONYMOUS}))}


async def test_a_notification_wakes_every_request_for_the_model() -> None:
    """Requests for other models continue to wait."""
    queue = _queue()
    with queue.ticket("m") as one, queue.ticket("m") as two, queue.ticket("x") as other:
        queue.notify("m")
        await one.wait(within_secs=1)
        await two.wait(within_secs=1)
        with pytest.raises(asyncio.TimeoutError):
            await other.wait(within_secs=0.01)


async def test_a_notification_between_two_waits_is_kept() -> None:
    """The next wait returns at once, but only one."""
    queue = _queue()
    with queue.ticket("m") as ticket:
        queue.notify("m")
        await ticket.wait(within_secs=1)
        with pytest.raises(asyncio.TimeoutError):
            await ticket.wait(within_secs=0.01)


async def test_a_refusal_reaches_every_waiting_request() -> None:
    """Each of them gets the error with its reason."""
    queue = _queue()

    async def error_of(ticket: Ticket) -> str | None:
        try:
            await ticket.wait(within_secs=1)
        except Unavailable as error:
            return error.code
        return None

    with queue.ticket("m") as one, queue.ticket("m") as two, queue.ticket("x") as other:
        queue.refuse("m", Unavailable("no", code="cold_load_failed", retry_after=3))
        queue.notify("x")
        assert await asyncio.gather(*(map(error_of, (one, two, other)))) == [
            "cold_load_failed",
            "cold_load_failed",
            None,
        ]


def test_a_notification_for_a_model_without_requests() -> None:
    """A notification or a refusal changes nothing if no request waits."""
    queue = _queue()
    queue.notify("m")
    queue.refuse("m", Unavailable("no", code="cold_load_failed", retry_after=3))
    assert queue.waiting() == {}
