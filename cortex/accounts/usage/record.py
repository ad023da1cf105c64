"""The record of one request. Pure. Not compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

import msgspec


class UsageRecord(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One request that has ended. Tokens are those that the engine counted, None where it told none.

    `ended_at`: seconds since 1970. `key_id`, `key`: id and name of the API key, "" and "anonymous" without. `model`: id
    in the catalogue; `variant`, `node`, `instance`: where it was served, "" if nowhere. `path`: without its
    query and without ids. `status`: as in the access log. `prompt_tokens` includes `cached_tokens`, `completion_tokens`
    includes `reasoning_tokens`. Durations are seconds: `queued_secs` is the wait for an engine, a cold load included;
    `first_byte_secs` from the request to the first byte of the answer, None without one. `complete`: the client got
    the whole answer.
    """

    ended_at: float
    request_id: str
    key_id: str
    key: str
    model: str
    variant: str
    node: str
    instance: str
    path: str
    status: int
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    reasoning_tokens: int | None
    first_byte_secs: float | None
    secs: float
    queued_secs: float
    cold: bool
    complete: bool
