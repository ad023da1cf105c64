"""What a report of usage asks the database: sums over daily sums where it has whole days, else over records."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Select,
    Subquery,
    Table,
    case,
    cast,
    false,
    func,
    literal_column,
    or_,
    select,
    union_all,
)

from cortex.accounts.database.latency_classes import UPPER_SECS
from cortex.accounts.database.tables import LATENCY_CLASSES, USAGE, USAGE_DAYS, USAGE_TOKENS
from cortex.accounts.database.usage_days import DAY_SECS, day_of
from cortex.accounts.usage.periods import period
from cortex.accounts.usage.query import TIMES, UsageQuery

PERCENT: Final = 95
_NAMED: Final = ("key_id", "key", "model", "variant", "node", "path", "status")
_SUMMED: Final = ("requests", *USAGE_TOKENS, "energy_wh", "cold_starts")


class TimeSpan(NamedTuple):
    """Times from `since` up to, but not at, `until`."""

    since: float
    until: float

    def __bool__(self) -> bool:
        return self.since < self.until


class ReportTimes(NamedTuple):
    """Where a report looks: at the daily sums of `days`, and at the records of the other times."""

    records: tuple[TimeSpan, ...]
    days: TimeSpan


def times_of(query: UsageQuery, kept_since: float) -> ReportTimes:
    """Daily sums where there are whole days. `kept_since`: the records of earlier days are deleted, so these days count
    as a whole. Pure."""
    first, last = _next_day(query.since), day_of(query.until)
    if query.since < kept_since:
        first = day_of(query.since)
    if query.is_open or query.until <= kept_since:
        last = _next_day(query.until)
    if first >= last:
        return of_records_alone(query)
    edges = TimeSpan(query.since, first), TimeSpan(last, query.until)
    return ReportTimes(tuple(edge for edge in edges if edge), TimeSpan(first, last))


def needs_records(query: UsageQuery) -> bool:
    """Whether its groups are shorter than a day."""
    return "hour" in query.group_by or bool(query.bucket_secs % DAY_SECS)


def _next_day(at: float) -> float:
    return day_of(at) if day_of(at) == at else day_of(at) + DAY_SECS


def of_records_alone(query: UsageQuery) -> ReportTimes:
    return ReportTimes((TimeSpan(query.since, query.until),), TimeSpan(0, 0))


def requests_of_days(query: UsageQuery) -> Select[Any]:
    """How many requests ended on the days of the query."""
    days = TimeSpan(day_of(query.since), query.until)
    return select(func.coalesce(func.sum(USAGE_DAYS.c.requests), 0)).where(*_chosen(query, USAGE_DAYS, (days,)))


def totals(query: UsageQuery, times: ReportTimes, currency: str, *, is_postgresql: bool) -> Select[Any]:
    """The groups, in their order, and their sums; with a number for each class of `first_byte_secs` if some of it are
    daily sums. Without groups it is one row."""
    used = _used(query, times, currency)
    groups = _groups(query, used, is_postgresql=is_postgresql)
    answered = func.sum(used.c.answered)
    columns = [
        *(
            cast(func.coalesce(func.sum(used.c[name]), 0), BigInteger).label(name)
            for name in _SUMMED
            if name != "energy_wh"
        ),
        cast(func.coalesce(func.sum(used.c.errors), 0), BigInteger).label("errors"),
        *(func.coalesce(func.sum(used.c[name]), 0.0).label(name) for name in ("cost", "energy_wh")),
        cast(func.sum(used.c.first_byte_secs) / func.nullif(answered, 0), Double).label("first_byte_secs_mean"),
    ]
    if times.days:
        columns += [cast(func.coalesce(func.sum(used.c[name]), 0), BigInteger).label(name) for name in LATENCY_CLASSES]
    asked = select(*(column.label(name) for name, column in groups.items()), *columns)
    return asked.group_by(*groups.values()).order_by(*groups.values()) if groups else asked


def slowest(query: UsageQuery, times: ReportTimes, *, is_postgresql: bool) -> Select[Any]:
    """The 95th percentile of each group of records, by the nearest rank: neither database has a function that the
    other has."""
    groups = _groups(query, USAGE, is_postgresql=is_postgresql)
    part = list(groups.values()) or None
    secs = USAGE.c.first_byte_secs
    ranked = (
        select(
            *(column.label(name) for name, column in groups.items()),
            secs.label("secs"),
            func.row_number().over(partition_by=part, order_by=secs).label("rank"),
            func.count().over(partition_by=part).label("of"),
        )
        .where(*_chosen(query, USAGE, times.records), secs.is_not(None))
        .subquery()
    )
    names = [ranked.c[name] for name in groups]
    reached = ranked.c.rank * 100 >= ranked.c.of * PERCENT
    asked = select(*names, func.min(ranked.c.secs).label("first_byte_secs_p95")).where(reached)
    return asked.group_by(*names) if names else asked


def _groups(query: UsageQuery, used: FromClause, *, is_postgresql: bool) -> dict[str, ColumnElement[Any]]:
    at = used.c.at if "at" in used.c else used.c.ended_at
    found: dict[str, ColumnElement[Any]] = {}
    for name in query.group_by:
        found[name] = period(name, at, is_postgresql=is_postgresql) if name in TIMES else used.c[name]
    if query.bucket_secs:
        width: ColumnElement[int] = literal_column(str(query.bucket_secs))
        number = at / width
        whole = func.floor(number) if is_postgresql else number  # SQLite's cast drops the fraction
        found["bucket"] = cast(whole, BigInteger) * width
    return found


def _used(query: UsageQuery, times: ReportTimes, currency: str) -> Subquery:
    """Records and daily sums with the same columns."""
    parts = []
    if times.records or not times.days:
        parts.append(_of_records(query, times, currency))
    if times.days:
        parts.append(_of_days(query, times.days, currency))
    return (parts[0] if len(parts) == 1 else union_all(*parts)).subquery()


def _of_records(query: UsageQuery, times: ReportTimes, currency: str) -> Select[Any]:
    own, secs = USAGE.c, USAGE.c.first_byte_secs
    columns = [
        own.ended_at.label("at"),
        *(own[name] for name in _NAMED),
        literal_column("1").label("requests"),
        _is(own.status >= 400).label("errors"),
        *(own[name] for name in USAGE_TOKENS),
        case((own.currency == currency, own.cost), else_=0.0).label("cost"),
        own.energy_wh,
        _is(own.cold).label("cold_starts"),
        secs,
        _is(secs.is_not(None)).label("answered"),
    ]
    if times.days:
        columns += [_is(_in_class(secs, number)).label(name) for number, name in enumerate(LATENCY_CLASSES)]
    return select(*columns).where(*_chosen(query, USAGE, times.records))


def _of_days(query: UsageQuery, days: TimeSpan, currency: str) -> Select[Any]:
    own = USAGE_DAYS.c
    answered: ColumnElement[Any] = own[LATENCY_CLASSES[0]]
    for name in LATENCY_CLASSES[1:]:
        answered = answered + own[name]
    columns = [
        own.day.label("at"),
        *(own[name] for name in _NAMED),
        own.requests,
        case((own.status >= 400, own.requests), else_=0).label("errors"),
        *(own[name] for name in USAGE_TOKENS),
        case((own.currency == currency, own.cost), else_=0.0).label("cost"),
        own.energy_wh,
        own.cold_starts,
        own.first_byte_secs,
        answered.label("answered"),
        *(own[name] for name in LATENCY_CLASSES),
    ]
    return select(*columns).where(*_chosen(query, USAGE_DAYS, (days,)))


def _is(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return case((condition, 1), else_=0)


def _in_class(secs: ColumnElement[Any], number: int) -> ColumnElement[bool]:
    if number == 0:
        return secs <= UPPER_SECS[0]
    above = secs > UPPER_SECS[number - 1]
    return above if number == len(UPPER_SECS) else above & (secs <= UPPER_SECS[number])


def _chosen(query: UsageQuery, table: Table, times: tuple[TimeSpan, ...]) -> list[ColumnElement[bool]]:
    at = table.c.day if table is USAGE_DAYS else table.c.ended_at
    found: list[ColumnElement[bool]] = [or_(false(), *((at >= each.since) & (at < each.until) for each in times))]
    if query.key_id is not None:
        found.append(table.c.key_id == query.key_id)
    if query.keys:
        found.append(table.c.key.in_(query.keys) | table.c.key_id.in_(query.keys))
    if query.models:
        found.append(table.c.model.in_(query.models))
    if query.paths:
        found.append(table.c.path.in_(query.paths))
    return found
