"""Which usage is asked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Final

from cortex.accounts.caller import Caller, may
from cortex.config.durations import parse_duration
from shared.errors import Forbidden, InvalidRequest, shortened

TIMES: Final = ("hour", "day", "month")
"""Periods, in UTC, by the end of a request."""
GROUPS: Final = ("key", "model", "variant", "node", "path", "status", *TIMES)
FILTERS: Final = ("key", "model")
PARAMETERS: Final = ("group_by", "from", "to", *FILTERS)
DEFAULT_SECS: Final = 30 * 86_400.0
"""How far a report without `from` goes back."""


@dataclass(frozen=True)
class UsageQuery:
    """Requests that ended from `since` up to, but not at, `until` (seconds since 1970), in groups. `keys` (ids or
    names) and `models`: only these, all if empty. `paths`: likewise. `key_id`: only this key; "" is a client without
    one, None is any client. `bucket_secs`: also in groups of this many seconds, 0 for none."""

    since: float
    until: float
    group_by: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    key_id: str | None = None
    bucket_secs: int = 0


def parse_query(given: Sequence[tuple[str, str]], now: float) -> UsageQuery:
    """The query of a URL, as pairs of names and values.

    Raises:
        InvalidRequest: it has an unknown parameter or a wrong value.
    """
    values: dict[str, list[str]] = {}
    for name, value in given:
        if name not in PARAMETERS:
            raise InvalidRequest(
                f"unknown parameter {shortened(name)!r}; allowed are {', '.join(PARAMETERS)}", param=shortened(name)
            )
        values.setdefault(name, []).extend(part.strip() for part in value.split(",") if part.strip())
    for name in ("from", "to"):
        if len(values.get(name, ())) > 1:
            raise InvalidRequest(f"{name} takes one time", param=name)
    group_by = tuple(dict.fromkeys(values.get("group_by", ())))
    for group in group_by:
        if group not in GROUPS:
            raise InvalidRequest(
                f"group_by: unknown group {shortened(group)!r}; allowed are {', '.join(GROUPS)}", param="group_by"
            )
    until = _time("to", values["to"][0], now) if values.get("to") else now
    since = _time("from", values["from"][0], now) if values.get("from") else until - DEFAULT_SECS
    if since >= until:
        raise InvalidRequest("from must be before to", param="from")
    return UsageQuery(since, until, group_by, tuple(values.get("key", ())), tuple(values.get("model", ())))


def _time(name: str, text: str, now: float) -> float:
    """Seconds since 1970, an ISO 8601 date or time (UTC unless it says otherwise), or a duration before now."""
    if text.replace(".", "", 1).isdecimal() and len(text) >= 9:
        return float(text)
    try:
        return now - parse_duration(text)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1] in "zZ" else text)
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{name}: {shortened(text)!r} cannot be read: write 2026-11-29, 2026-11-29T12:00:00Z, seconds since 1970, "
            "or how long ago: 7d, 24h",
            param=name,
        ) from None


def seen_by(caller: Caller, query: UsageQuery) -> UsageQuery:
    """The query as this caller may ask it: viewers see all, a user itself.

    Raises:
        Forbidden: it asks for another key, or has none.
    """
    if may(caller.role, "viewer"):
        return query
    if not caller.key_id:
        raise Forbidden("without an API key there is no usage of your own; usage of all needs the role viewer")
    others = [key for key in query.keys if key not in (caller.key_id, caller.name)]
    if others:
        raise Forbidden(
            f"the API key {caller.name!r} has the role {caller.role}, which sees its own usage only, not that of "
            f"{shortened(others[0])!r}"
        )
    return replace(query, key_id=caller.key_id)
