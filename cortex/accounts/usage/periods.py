"""Hours, days and months of a column of times, in SQL."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, String, cast, func, literal_column

_SQLITE_FORMATS: Final = {"hour": "%Y-%m-%dT%H:00Z", "day": "%Y-%m-%d", "month": "%Y-%m"}
_POSTGRESQL_FORMATS: Final = {"hour": 'YYYY-MM-DD"T"HH24":00Z"', "day": "YYYY-MM-DD", "month": "YYYY-MM"}


def period(name: str, at: ColumnElement[Any], *, is_postgresql: bool) -> ColumnElement[str]:
    """The `hour`, `day` or `month` in UTC of seconds since 1970, as text that sorts by time."""
    # Not parameters: PostgreSQL must see that the group and the column are the same.
    if is_postgresql:
        moment = func.timezone("UTC", func.to_timestamp(at))
        return cast(func.to_char(moment, literal_column(f"'{_POSTGRESQL_FORMATS[name]}'")), String)
    return cast(func.strftime(literal_column(f"'{_SQLITE_FORMATS[name]}'"), at, "unixepoch"), String)
