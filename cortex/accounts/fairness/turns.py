"""The order in which requests of several callers get the places of a saturated model. Pure.

By the caller's priority, callers without a key last; then start-time fair queueing over the callers (Goyal, Vin, Cheng
1996). A caller's tag is what it has used, in tokens divided by its weight; the lowest tag is next, and among equal ones
the request that arrived first. A caller that begins to wait has at least the tag of the request that was served last,
so that an idle caller saves no turns up. One caller's requests keep their order.

Requests may stand in several lines, by what can serve them (a model, or one of its variants). A caller's tag holds for
all lines, so a place that requests of several lines may take goes to the caller that has used least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeAlias, TypeVar

from cortex.accounts.caller import Caller

Item = TypeVar("Item")
Level: TypeAlias = tuple[bool, int]
"""See `level_of`."""
_Turn: TypeAlias = tuple[Level, float, int, int, str]
"""Level, tag and oldest sleeper in a line of a flow, its version at that time, and its key id."""

MIN_TOKENS = 1.0
"""A request costs at least this much, so that requests of unknown size take turns too."""


def level_of(caller: Caller) -> Level:
    """Sorts callers that are served before all of another level: smaller is better."""
    return not caller.key_id, -caller.priority


@dataclass
class _Flow:
    """The requests of one caller. `called` is what those cost that have been called and not been served yet."""

    caller: Caller
    tag: float
    waiting: Counter[str] = field(default_factory=Counter)  # by line
    called: float = 0.0
    version: int = 0
    sleepers: dict[str, list[int]] = field(default_factory=dict)
    """By line, a heap of request numbers, with some that have left."""

    @property
    def next_tag(self) -> float:
        """The tag once those that have been called are served."""
        return self.tag + self.called / self.caller.weight


@dataclass
class _Request(Generic[Item]):
    item: Item
    flow: _Flow
    tokens: float
    line: str
    asleep: bool = True


class Turns(Generic[Item]):
    """The waiting requests of one model. Every step takes time logarithmic in their number, averaged over the steps."""

    def __init__(self) -> None:
        self._requests: dict[int, _Request[Item]] = {}  # by number, in order of arrival
        self._numbers: dict[Item, int] = {}
        self._flows: dict[str, _Flow] = {}
        self._served: dict[Level, float] = {}  # the highest tag of a served request
        self._turns: dict[str, list[_Turn]] = {}  # by line a heap; of each flow the entry of its version counts
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Item]:
        """In order of arrival."""
        return (request.item for request in self._requests.values())

    def callers(self, line: str = "") -> frozenset[Caller]:
        """Those whose requests wait in this line."""
        return frozenset(flow.caller for flow in self._flows.values() if line in flow.waiting)

    @property
    def owed(self) -> bool:
        """Whether a caller has used more than others, so that its next request has a later turn."""
        return bool(self._flows)

    def add(self, item: Item, caller: Caller, tokens: float, line: str = "") -> None:
        """A request arrives. `tokens`: an estimate of what it will use."""
        self._arrivals += 1
        number, flow = self._arrivals, self._begin(caller)
        flow.waiting[line] += 1
        self._requests[number] = _Request(item, flow, max(MIN_TOKENS, tokens), line)
        self._numbers[item] = number
        heappush(flow.sleepers.setdefault(line, []), number)
        self._changed(flow)

    def call(self, *lines: str) -> Item | None:
        """The request of these lines whose turn it is, without any of the line ""; None if all have been called."""
        turn = min((turn for line in lines or ("",) if (turn := self._next(line)) is not None), default=None)
        if turn is None:
            return None
        request = self._requests[turn[2]]
        flow = request.flow
        heappop(flow.sleepers[request.line])
        request.asleep = False
        flow.called += request.tokens
        self._changed(flow)
        return request.item

    def _next(self, line: str) -> _Turn | None:
        turns = self._turns.get(line, [])
        while turns:
            _, _, _, version, key_id = turns[0]
            flow = self._flows.get(key_id)
            if flow is not None and flow.version == version:
                return turns[0]
            heappop(turns)
        return None

    def put_back(self, item: Item) -> None:
        """A request that was called waits again, in its old place."""
        number = self._numbers[item]
        request = self._requests[number]
        if not request.asleep:
            request.asleep = True
            request.flow.called -= request.tokens
            heappush(request.flow.sleepers[request.line], number)
            self._changed(request.flow)

    def remove(self, item: Item, *, served: bool) -> None:
        """A request waits no more: it is served, or leaves."""
        request = self._requests.pop(self._numbers.pop(item))
        flow = request.flow
        flow.waiting[request.line] -= 1
        if not flow.waiting[request.line]:
            del flow.waiting[request.line]
        if not request.asleep:
            flow.called -= request.tokens
        if not flow.waiting:
            flow.called = 0.0  # despite rounding
        if served:
            self._charge(flow, request.tokens)
        self._changed(flow)
        if not self._requests:
            self._forget()

    def _begin(self, caller: Caller) -> _Flow:
        """The caller's flow, brought up to date."""
        served = self._served.setdefault(level_of(caller), 0.0)
        flow = self._flows.get(caller.key_id)
        if flow is None:
            flow = self._flows[caller.key_id] = _Flow(caller, served)
        elif level_of(flow.caller) != level_of(caller):
            flow.tag = served
        elif not flow.waiting:
            flow.tag = max(flow.tag, served)
        flow.caller = caller
        return flow

    def _charge(self, flow: _Flow, tokens: float) -> None:
        level = level_of(flow.caller)
        self._served[level] = max(self._served[level], flow.tag)
        flow.tag += tokens / flow.caller.weight

    def _changed(self, flow: _Flow) -> None:
        """Renews the flow's entries in the heaps."""
        flow.version += 1
        for line, sleepers in list(flow.sleepers.items()):
            while sleepers and not self._sleeps(sleepers[0]):
                heappop(sleepers)
            if sleepers:
                self._renew(line, flow)
            elif line not in flow.waiting:
                del flow.sleepers[line]

    def _renew(self, line: str, flow: _Flow) -> None:
        turns = self._turns.setdefault(line, [])
        heappush(turns, self._turn(flow, line))
        if len(turns) > 64 + 4 * len(self._flows):
            turns[:] = [self._turn(each, line) for each in self._flows.values() if each.sleepers.get(line)]
            heapify(turns)

    def _turn(self, flow: _Flow, line: str) -> _Turn:
        return level_of(flow.caller), flow.next_tag, flow.sleepers[line][0], flow.version, flow.caller.key_id

    def _sleeps(self, number: int) -> bool:
        request = self._requests.get(number)
        return request is not None and request.asleep

    def _forget(self) -> None:
        """Drops the callers whose tags say no more than that they have waited."""
        served = self._served
        self._flows = {key_id: flow for key_id, flow in self._flows.items() if flow.tag > served[level_of(flow.caller)]}
        self._turns.clear()
