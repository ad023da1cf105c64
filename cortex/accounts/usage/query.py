"""Which usage is asked for. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Final, NamedTuple, TypeVar

from cortex.accounts.caller import Caller, may
from cortex.accounts.energy.attribution import HOUR_SECS
from cortex.config.durations import parse_duration
from shared.errors import Forbidden, InvalidRequest, shortened

TIMES: Final = ("hour", "day", "month")
"""Periods, in UTC, by the end of a request."""
GROUPS: Final = ("key", "model", "variant", "node", "path", "status", *TIMES)
FILTERS: Final = ("key", "model")
ENERGY_KINDS: Final = ("request", "resident", "idle", "pending")
"""What energy was used for; `pending`: an engine used it, and it is not attributed yet."""
ENERGY_GROUPS: Final = ("node", "device", "model", "key", "kind", *TIMES)
ENERGY_FILTERS: Final = ("node", "model", "key", "kind")
DEFAULT_SECS: Final = 30 * 86_400.0
"""How far a report without `from` goes back."""
_YEAR_10000: Final = 253_402_300_800.0


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
    is_open: bool = False


@dataclass(frozen=True)
class EnergyQuery:
    """Energy of the hours that begin from `since` up to, but not at, `until` (seconds since 1970, both full hours), in
    groups. `keys`, `models` and `key_id` are as in UsageQuery; `nodes` and `kinds`: only these, all if empty."""

    since: float
    until: float
    group_by: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    key_id: str | None = None


def parse_query(given: Sequence[tuple[str, str]], now: float) -> UsageQuery:
    """The query of a URL, as pairs of names and values.

    Raises:
        InvalidRequest: it has an unknown parameter or a wrong value.
    """
    asked = _parameters(given, GROUPS, FILTERS, now)
    return UsageQuery(
        asked.since,
        asked.until,
        asked.group_by,
        asked.only("key"),
        asked.only("model"),
        is_open=not asked.values.get("to"),
    )


def parse_energy_query(given: Sequence[tuple[str, str]], now: float) -> EnergyQuery:
    """As `parse_query`. Energy is known by the hour, so hours count that the times lie in."""
    asked = _parameters(given, ENERGY_GROUPS, ENERGY_FILTERS, now)
    for kind in asked.only("kind"):
        if kind not in ENERGY_KINDS:
            raise InvalidRequest(
                f"kind: unknown kind {shortened(kind)!r}; allowed are {', '.join(ENERGY_KINDS)}", param="kind"
            )
    return EnergyQuery(
        since=asked.since // HOUR_SECS * HOUR_SECS,
        until=math.ceil(asked.until / HOUR_SECS) * HOUR_SECS,
        group_by=asked.group_by,
        keys=asked.only("key"),
        models=asked.only("model"),
        nodes=asked.only("node"),
        kinds=asked.only("kind"),
    )


class _Parameters(NamedTuple):
    since: float
    until: float
    group_by: tuple[str, ...]
    values: Mapping[str, Sequence[str]]

    def only(self, name: str) -> tuple[str, ...]:
        return tuple(self.values.get(name, ()))


def _parameters(
    given: Iterable[tuple[str, str]], groups: Sequence[str], filters: Sequence[str], now: float
) -> _Parameters:
    allowed = ("group_by", "from", "to", *filters)
    values: dict[str, list[str]] = {}
    for name, value in given:
        if name not in allowed:
            raise InvalidRequest(
                f"unknown parameter {shortened(name)!r}; allowed are {', '.join(allowed)}", param=shortened(name)
            )
        values.setdefault(name, []).extend(part.strip() for part in value.split(",") if part.strip())
    for name in ("from", "to"):
        if len(values.get(name, ())) > 1:
            raise InvalidRequest(f"{name} takes one time", param=name)
    group_by = tuple(dict.fromkeys(values.get("group_by", ())))
    for group in group_by:
        if group not in groups:
            raise InvalidRequest(
                f"group_by: unknown group {shortened(group)!r}; allowed are {', '.join(groups)}", param="group_by"
            )
    until = _time("to", values["to"][0], now) if values.get("to") else now
    since = _time("from", values["from"][0], now) if values.get("from") else until - DEFAULT_SECS
    if since >= until:
        raise InvalidRequest("from must be before to", param="from")
    return _Parameters(since, until, group_by, values)


def _time(name: str, text: str, now: float) -> float:
    """Seconds since 1970, an ISO 8601 date or time (UTC unless it says otherwise), or a duration before now."""
    if text.replace(".", "", 1).isdecimal() and len(text) >= 9 and float(text) < _YEAR_10000:
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


Query = TypeVar("Query", UsageQuery, EnergyQuery)


def seen_by(caller: Caller, query: Query) -> Query:
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
