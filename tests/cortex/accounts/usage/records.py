"""Records of usage for tests."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from cortex.accounts.usage.record import UsageRecord

_NUMBERS = itertools.count()
_RECORD = UsageRecord(
    ended_at=1_800_000_000.5,
    request_id="",
    key_id="k1",
    key="alice",
    model="org/small",
    variant="",
    node="benjy",
    instance="",
    path="/v1/chat/completions",
    status=200,
    prompt_tokens=10,
    cached_tokens=4,
    completion_tokens=5,
    reasoning_tokens=2,
    first_byte_secs=0.1,
    secs=1.0,
    queued_secs=0.0,
    cold=False,
    complete=True,
)


def usage_record(**fields: Any) -> UsageRecord:
    """A request that has ended, with an id of its own unless one is given."""
    return msgspec.structs.replace(_RECORD, **{"request_id": f"request-{next(_NUMBERS)}", **fields})
