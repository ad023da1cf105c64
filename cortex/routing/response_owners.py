"""Which engine made a stored answer: `/v1/responses/{id}` must go to it, because no other knows the id. No I/O."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

import msgspec

from cortex.routing.replica import Replica, ReplicaKey

MAX_IDS: Final = 20_000
SEARCHED_BYTES: Final = 4096
"""Of an answer's start; engines write the id first."""

UNSTORED: Final = "resp_chat_"
"""How the id of a response begins that cortex made of a chat's answer: no engine has it."""

_ID: Final = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9._:-]{1,200})"')


class OwnerList(msgspec.Struct, frozen=True):
    """ResponseOwners as a message. `responses` has the place in `engines` by response id, oldest first."""

    engines: list[Replica]
    responses: dict[str, int]


class ResponseOwners:
    """The engines of the last MAX_IDS answers. A replica without URL is known from before cortex's restart."""

    def __init__(self, owners: OwnerList | None = None) -> None:
        self._owners: OrderedDict[str, Replica] = OrderedDict()
        if owners is not None:
            self._owners.update((made, owners.engines[place]) for made, place in owners.responses.items())

    def add(self, response_id: str, replica: Replica) -> None:
        self._owners[response_id] = replica
        self._owners.move_to_end(response_id)
        if len(self._owners) > MAX_IDS:
            self._owners.popitem(last=False)

    def find(self, response_id: str) -> Replica | None:
        return self._owners.get(response_id)

    def listed(self) -> OwnerList:
        """All of them."""
        return _listed(self._owners.items())

    def newest(self, count: int) -> OwnerList:
        """The engines of the newest without URLs and API keys, for a file: these may change until it is read."""
        latest = list(self._owners.items())[-count:]
        stored = ((made, Replica(key=each.key, name=each.name, url="", adapter=each.adapter)) for made, each in latest)
        return _listed(stored)


def _listed(owners: Iterable[tuple[str, Replica]]) -> OwnerList:
    engines: list[Replica] = []
    places: dict[tuple[ReplicaKey, str, str | None], int] = {}
    responses: dict[str, int] = {}
    for made, replica in owners:
        key = replica.key, replica.url, replica.adapter
        if key not in places:
            places[key] = len(engines)
            engines.append(replica)
        responses[made] = places[key]
    return OwnerList(engines, responses)


def response_id(start: bytes) -> str | None:
    """The id in the start of an answer of `/v1/responses`, JSON or an event stream."""
    found = _ID.search(start, 0, SEARCHED_BYTES)
    return None if found is None else found[1].decode()
