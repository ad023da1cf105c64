"""Which engine made a stored answer, and for which API key: `/v1/responses/{id}` must go to that engine, because no
other knows the id, and is for that key only. No I/O."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

import msgspec

from cortex.routing.replica import Replica, ReplicaKey
from shared.errors import NotFound, shortened
from shared.protocol import ErrorCode
from shared.subscribers import Subscribers

MAX_IDS: Final = 20_000
SEARCHED_BYTES: Final = 4096
"""Of an answer's start; engines write the id first."""

UNSTORED: Final = "resp_chat_"
"""How the id of a response begins that cortex made of a chat's answer: no engine has it."""

_ID: Final = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9._:-]{1,200})"')


class ResponseMaker(msgspec.Struct, frozen=True):
    """The engine that made a response, and the API key (`Caller.key_id`) of the client that it was made for. None: not
    known, from a file of a version that did not keep it."""

    engine: Replica
    key_id: str | None


class OwnerList(msgspec.Struct, frozen=True):
    """ResponseOwners as a message. `responses` has the place in `makers` by response id, oldest first."""

    makers: list[ResponseMaker]
    responses: dict[str, int]


class ResponseOwners:
    """The makers of the last MAX_IDS answers. An engine without URL is known from before cortex's restart. `additions`
    announces the id of each that is added."""

    def __init__(self, owners: OwnerList | None = None) -> None:
        self.additions: Subscribers[[str]] = Subscribers()
        self._owners: OrderedDict[str, ResponseMaker] = OrderedDict()
        if owners is not None:
            self._owners.update((made, owners.makers[place]) for made, place in owners.responses.items())

    def add(self, response_id: str, maker: ResponseMaker) -> None:
        self._owners[response_id] = maker
        self._owners.move_to_end(response_id)
        if len(self._owners) > MAX_IDS:
            self._owners.popitem(last=False)
        self.additions.announce(response_id)

    def find(self, response_id: str) -> ResponseMaker | None:
        return self._owners.get(response_id)

    def listed(self) -> OwnerList:
        """All of them."""
        return _listed(self._owners.items())

    def newest(self, count: int) -> OwnerList:
        """The makers of the newest, for a file: without URLs and secrets of engines, which may change meanwhile."""
        latest = list(self._owners.items())[-count:]
        return _listed((made, ResponseMaker(_without_endpoint(maker.engine), maker.key_id)) for made, maker in latest)


def _without_endpoint(engine: Replica) -> Replica:
    return Replica(key=engine.key, name=engine.name, url="", adapter=engine.adapter)


def _listed(owners: Iterable[tuple[str, ResponseMaker]]) -> OwnerList:
    makers: list[ResponseMaker] = []
    places: dict[tuple[ReplicaKey, str, str | None, str | None], int] = {}
    responses: dict[str, int] = {}
    for made, maker in owners:
        engine = maker.engine
        key = engine.key, engine.url, engine.adapter, maker.key_id
        if key not in places:
            places[key] = len(makers)
            makers.append(maker)
        responses[made] = places[key]
    return OwnerList(makers, responses)


def response_id(start: bytes) -> str | None:
    """The id in the start of an answer of `/v1/responses`, JSON or an event stream."""
    found = _ID.search(start, 0, SEARCHED_BYTES)
    return None if found is None else found[1].decode()


def unknown_response(response_id: str, *, param: str | None = None) -> NotFound:
    """The error for a response that cortex does not know, or that the client's key did not make: the client is not told
    which."""
    return NotFound(
        f"no engine has the response {shortened(response_id)!r} for this client: engines forget responses when their"
        " model is unloaded, cortex knows the makers of the latest ones only, and an API key may use only the responses"
        " that were made with it",
        code=ErrorCode.NOT_FOUND,
        param=param,
    )
