"""Which engine made a stored answer: `/v1/responses/{id}` must go to it, because no other knows the id. No I/O."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final

from cortex.routing.replica import Replica

MAX_IDS: Final = 20_000
SEARCHED_BYTES: Final = 4096
"""Of an answer's start; engines write the id first."""

UNSTORED: Final = "resp_chat_"
"""How the id of a response begins that cortex made of a chat's answer: no engine has it."""

_ID: Final = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9._:-]{1,200})"')


class ResponseOwners:
    """The engines of the last MAX_IDS answers."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, Replica] = OrderedDict()

    def add(self, response_id: str, replica: Replica) -> None:
        self._owners[response_id] = replica
        self._owners.move_to_end(response_id)
        if len(self._owners) > MAX_IDS:
            self._owners.popitem(last=False)

    def find(self, response_id: str) -> Replica | None:
        return self._owners.get(response_id)


def response_id(start: bytes) -> str | None:
    """The id in the start of an answer of `/v1/responses`, JSON or an event stream."""
    found = _ID.search(start, 0, SEARCHED_BYTES)
    return None if found is None else found[1].decode()
