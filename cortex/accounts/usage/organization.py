"""Usage and costs in the shapes of OpenAI's API for organizations. Pure.

Source: the types of OpenAI's Python client, `openai.types.admin.organization`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from cortex.accounts.usage.query import UsageQuery
from shared.errors import InvalidRequest, shortened

Kind: TypeAlias = Literal["completions", "embeddings", "costs"]


class _Width(NamedTuple):
    secs: int
    limit: int  # buckets of a page, unless the client says
    max_limit: int


_WIDTHS: Final = {"1m": _Width(60, 60, 1440), "1h": _Width(3600, 24, 168), "1d": _Width(86_400, 7, 31)}
_COST_WIDTHS: Final = {"1d": _Width(86_400, 7, 180)}
_PATHS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "completions": ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    "embeddings": ("/v1/embeddings",),
    "costs": (),
}
_GROUPS: Final = {"api_key_id": "key_id", "model": "model"}
_UNGROUPED: Final = ("project_id", "user_id", "batch", "service_tier", "line_item", "api_source")
"""Groups that cortex does not have: what they would say is null."""
_LISTS: Final = frozenset({"group_by", "models", "api_key_ids"})
_PARAMETERS: Final = (
    *("start_time", "end_time", "bucket_width", "group_by", "models", "api_key_ids", "batch", "limit", "page"),
)
_PAGE: Final = "page_"


@dataclass(frozen=True)
class BucketQuery:
    """What is asked for: `query` covers one page, whose buckets begin at `starts`. `end`: of everything. `batch`: only
    batch jobs, which cortex does not have."""

    kind: Kind
    query: UsageQuery
    starts: range
    end: int
    batch: bool = False


def parse_bucket_query(kind: Kind, given: Iterable[tuple[str, str]], now: float) -> BucketQuery:
    """The query of a URL, as pairs of names and values; lists as `name=a&name=b`, with or without `[]`.

    Raises:
        InvalidRequest: it has an unknown parameter or a wrong value, or no `start_time`.
    """
    values: dict[str, list[str]] = {}
    for raw_name, value in given:
        name = raw_name.removesuffix("[]")
        if name not in _PARAMETERS:
            raise InvalidRequest(
                f"unknown parameter {shortened(name)!r}; allowed are {', '.join(_PARAMETERS)}", param=shortened(name)
            )
        values.setdefault(name, []).extend(value.split(",") if name in _LISTS else [value])
    width = _width(kind, values)
    if "start_time" not in values:
        raise InvalidRequest("start_time is required, in seconds since 1970", param="start_time")
    start, end = _whole(values, "start_time", 0), _whole(values, "end_time", int(now) + 1)
    limit = _whole(values, "limit", width.limit)
    if not 1 <= limit <= width.max_limit:
        raise InvalidRequest(f"limit must be from 1 to {width.max_limit} for this bucket_width", param="limit")
    first = start - start % width.secs if "page" not in values else _page(values["page"][-1], width.secs)
    last = min(end, first + limit * width.secs)
    query = UsageQuery(
        since=max(first, start),
        until=last,
        group_by=_groups(values.get("group_by", ())),
        keys=tuple(values.get("api_key_ids", ())),
        models=tuple(values.get("models", ())),
        paths=_PATHS[kind],
        bucket_secs=width.secs,
        is_open="end_time" not in values and last == end,
    )
    batch = values.get("batch", ["false"])[-1].lower()
    if batch not in ("true", "false"):
        raise InvalidRequest(f"batch must be true or false, got {shortened(batch)!r}", param="batch")
    return BucketQuery(kind, query, range(first, last, width.secs), end, batch=batch == "true")


def _width(kind: Kind, values: Mapping[str, Sequence[str]]) -> _Width:
    widths = _COST_WIDTHS if kind == "costs" else _WIDTHS
    name = values.get("bucket_width", ["1d"])[-1]
    if name not in widths:
        raise InvalidRequest(
            f"bucket_width: {shortened(name)!r} is unknown; allowed are {', '.join(widths)}", param="bucket_width"
        )
    return widths[name]


def _whole(values: Mapping[str, Sequence[str]], name: str, default: int) -> int:
    text = values[name][-1] if name in values else str(default)
    if not text.isdecimal() or len(text) > 12:
        raise InvalidRequest(f"{name} must be a whole number, got {shortened(text)!r}", param=name)
    return int(text)


def _page(text: str, width: int) -> int:
    start = text.removeprefix(_PAGE)
    if not text.startswith(_PAGE) or not start.isdecimal() or len(start) > 12 or int(start) % width:
        raise InvalidRequest("page must be the next_page of an earlier answer to the same query", param="page")
    return int(start)


def _groups(given: Iterable[str]) -> tuple[str, ...]:
    found = []
    for name in dict.fromkeys(given):
        if name in _GROUPS:
            found.append(_GROUPS[name])
        elif name not in _UNGROUPED:
            allowed = ", ".join((*_GROUPS, *_UNGROUPED))
            raise InvalidRequest(f"group_by: {shortened(name)!r} is unknown; allowed are {allowed}", param="group_by")
    return tuple(found)


def bucket_page(asked: BucketQuery, rows: Sequence[Mapping[str, Any]], currency: str) -> dict[str, Any]:
    """The answer: a page of buckets. `rows` are the sums of the query."""
    results: dict[int, list[dict[str, Any]]] = {start: [] for start in asked.starts}
    for row in () if asked.batch else rows:
        results.setdefault(row["bucket"], []).append(_result(asked.kind, row, currency))
    width = asked.query.bucket_secs
    buckets = [
        {"object": "bucket", "start_time": start, "end_time": start + width, "results": found}
        for start, found in results.items()
    ]
    more = asked.starts.stop < asked.end and bool(asked.starts)
    return {
        "object": "page",
        "data": buckets,
        "has_more": more,
        "next_page": f"{_PAGE}{asked.starts[-1] + width}" if more else None,
    }


def _result(kind: Kind, row: Mapping[str, Any], currency: str) -> dict[str, Any]:
    common = {"project_id": None, "user_id": None, "api_key_id": row.get("key_id")}
    if kind == "costs":
        amount = {"value": row["cost"], "currency": currency.lower()}
        return {"object": "organization.costs.result", "amount": amount, "line_item": None, **common}
    counted = {"input_tokens": row["prompt_tokens"], "num_model_requests": row["requests"]}
    result = {"object": f"organization.usage.{kind}.result", **counted, **common, "model": row.get("model")}
    if kind == "embeddings":
        return result
    return {
        **result,
        "output_tokens": row["completion_tokens"],
        "input_cached_tokens": row["cached_tokens"],
        "input_uncached_tokens": row["prompt_tokens"] - row["cached_tokens"],
        "batch": None,
        "service_tier": None,
    }
