"""The notes of a worker about its requests, their merge, and where a request's time went."""

from __future__ import annotations

import asyncio

from cortex.accounts.usage.record import UsageRecord
from cortex.fleet.timeline.spans import Phase, StatusSpan
from cortex.metrics.requests.entries import FailedAttempt, LiveRequest, SeenRequests
from cortex.metrics.requests.filter import RequestFilter
from cortex.metrics.requests.history import RequestHistory
from cortex.metrics.requests.ring import KEPT_REQUESTS, Note, RequestRing
from cortex.metrics.requests.waterfall import SpansByModel, waterfall

ALL = RequestFilter()


class Ongoing:
    """A request that came at `since`."""

    def __init__(self, since: float, key: str = "anonymous") -> None:
        self.since = since
        self.key = key

    def fits(self, asked: RequestFilter) -> bool:
        return asked.fits("", self.key, ("m",), "n", None)

    def shown(self) -> LiveRequest:
        model = ("m", "m", "", "n", "", "/v1/completions")
        return LiveRequest(self.since, "r", "", self.key, *model, "answering", "", 1.0, None, False, False, "", [], [])


class Worker:
    """As a gateway. `told`: how many live requests it has sent."""

    def __init__(self) -> None:
        self.ring = RequestRing()
        self.told = 0

    def begin(self, since: float, key: str = "anonymous") -> Ongoing:
        request = Ongoing(since, key)
        self.ring.began(request)
        return request

    def end(self, number: int) -> None:
        self.ring.ended(self.begin(number), note(number))

    async def requests_since(self, place: int, asked: RequestFilter, limit: int) -> SeenRequests:
        seen = self.ring.since(place, asked, limit)
        self.told += len(seen.live)
        return seen


def note(number: int) -> Note:
    tokens, secs = (1, 0, 1, 0), (0.1, 0.2, 0.0)
    record = UsageRecord(
        number, f"r{number}", "", "anonymous", "m", "", "n", "", "/v1/completions", 200, *tokens, *secs, False, True
    )
    return record, "m", "", "", False, "only", None, None


async def test_looks_at_two_workers() -> None:
    """A look has what ended in both since the last one, the newest first; too late, or after a restart of cortex, it
    has all that is known."""
    history, one, two = RequestHistory(), Worker(), Worker()
    history.attach(one)
    history.attach(two)
    for number in range(4):
        (one, two)[number % 2].end(number)
    first = await history.since(None, ALL, 1)
    assert (first.whole, [each.record.request_id for each in first.ended]) == (True, ["r3", "r2", "r1", "r0"])
    two.end(4)
    two_looks = await asyncio.gather(history.since(first.place, ALL, 1), history.since(first.place, ALL, 1))
    assert [[each.record.request_id for each in look.ended] for look in two_looks] == [["r4"], ["r4"]]
    assert not two_looks[0].whole
    history.detach(two)
    for number in range(5, 6 + KEPT_REQUESTS):
        one.end(number)
    late = await history.since(first.place, ALL, 1)
    assert (late.whole, len(late.ended)) == (True, KEPT_REQUESTS)
    assert (await RequestHistory().since(first.place, ALL, 1)).whole
    assert (await history.since(first.place + "9" * 5000, ALL, 1)).whole


async def test_a_worker_tells_no_more_live_requests_than_are_asked_for() -> None:
    """Of two workers the oldest that fit, and how many fit: there may be thousands."""
    history, workers = RequestHistory(), (Worker(), Worker())
    for worker in workers:
        history.attach(worker)
    begun = [workers[number % 2].begin(number, key=f"k{number // 4}") for number in range(12)]
    workers[1].ring.ended(begun[1], note(1))
    everything = await history.since(None, ALL, 3)
    assert ([each.since for each in everything.live], everything.live_count) == ([0, 2, 3], 11)
    of_key = await history.since(None, RequestFilter(key="k2"), 3)
    assert ([each.since for each in of_key.live], of_key.live_count) == ([8, 9, 10], 4)
    assert [worker.told for worker in workers] == [3 + 2, 3 + 2]


def steps(*spans: StatusSpan, waits: list[tuple[float, float]], secs: float = 10.0) -> list[tuple[str, str, int, int]]:
    """With kind, name, begin and end of each. The request came at 100."""
    found = waterfall("m", 100.0, secs, SpansByModel(spans), node="n", first_byte_secs=9.0, attempts=(), waits=waits)
    return [(each.kind, each.name, round(each.since), round(each.until)) for each in found]


def test_a_swap_step_by_step() -> None:
    """The load began before the request came, for another one; only what it has waited for counts."""
    old = StatusSpan(node="n", model="old", status="loaded", since=0, until=103, evicted_since=101, displaced_by="m")
    phases = (Phase("loading weights", 104), Phase("capturing graphs", 106))
    load = StatusSpan(node="n", model="m", status="loading", since=103, until=108, phases=phases)
    other = StatusSpan(node="n", model="other", status="loading", since=100, until=109)
    assert steps(old, load, other, waits=[(0, 8)]) == [
        ("wait", "waiting", 0, 1),
        ("unload", "old", 1, 3),
        ("load", "starting", 3, 4),
        ("load", "loading weights", 4, 6),
        ("load", "capturing graphs", 6, 8),
        ("engine", "until the first byte", 8, 9),
        ("answer", "answering", 9, 10),
    ]
    assert steps(load, waits=[(5, 8)])[0] == ("load", "loading weights", 5, 6)


def test_a_load_that_goes_on() -> None:
    load = StatusSpan(node="n", model="m", status="loading", since=95, phases=(Phase("loading weights", 96),))
    found = waterfall(
        "m", 100.0, 4.0, SpansByModel([load]), node="", first_byte_secs=None, attempts=(), waits=[(0, 4.0)]
    )
    assert [(each.name, each.since, each.until) for each in found] == [("loading weights", 0, 4.0)]


def test_a_failed_engine() -> None:
    attempts = [FailedAttempt("one", "", "reset", "connection lost", 2.0)]
    found = waterfall(
        "m", 100.0, 5.0, SpansByModel(()), node="two", first_byte_secs=4.0, attempts=attempts, waits=[(0.0, 1.0)]
    )
    assert [(each.kind, each.node, each.since, each.until) for each in found] == [
        ("wait", "", 0.0, 1.0),
        ("failed", "one", 1.0, 2.0),
        ("engine", "two", 2.0, 4.0),
        ("answer", "two", 4.0, 5.0),
    ]
