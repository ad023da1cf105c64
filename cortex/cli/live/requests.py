"""`cortex requests`."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from cortex.cli.options import ask
from shared.terminal.tables import Coloured, table

_HEAD = ["STARTED", "MODEL", "ON", "KEY", "STATUS", "WAITED", "FIRST BYTE", "TOOK", "TOKENS", ""]
_NUMBERS = frozenset({5, 6, 7, 8})


def ask_requests(url: str, *, errors: bool, model: str | None, key: str | None, node: str | None, limit: int) -> Any:
    """The answer of `GET /fleet/requests`."""
    query = {"status": "error" if errors else None, "model": model, "key": key, "node": node, "limit": limit}
    return ask(url, "GET", "/fleet/requests?" + urlencode({k: v for k, v in query.items() if v is not None}))


def requests_table(answer: dict[str, Any]) -> str:
    """A row for each request, the live ones first."""
    rows = [_row(each, "live", each["note"] or each["stage"]) for each in answer["live"]]
    rows += [_row(each, _status(each), _remark(each)) for each in answer["ended"]]
    hidden = answer["live_count"] - len(answer["live"])
    more = f"\nand {hidden} more live requests: --limit shows more" if hidden > 0 else ""
    return table([_HEAD, *rows], right=_NUMBERS) + more


def _row(each: dict[str, Any], status: object, remark: str) -> list[object]:
    return [
        f"{datetime.fromtimestamp(each['started']).astimezone():%H:%M:%S}",
        each["model"] or "-",
        "/".join(filter(None, (each["node"], each["instance"]))) or "-",
        each["key"],
        status,
        _secs(each["queued_secs"]) if each["queued_secs"] >= 0.001 else "-",
        _secs(each["first_byte_secs"]),
        _secs(each["secs"]),
        _tokens(each),
        remark,
    ]


def _status(each: dict[str, Any]) -> object:
    bad = each["status"] >= 400 or each["error"]
    return Coloured(str(each["status"]), "red") if bad else str(each["status"])


def _remark(each: dict[str, Any]) -> str:
    """What is special about it, on one line."""
    parts = ["cold start"] if each["cold"] else []
    parts += [f"{attempt['node']} failed ({attempt['kind']})" for attempt in each["attempts"]]
    if each["error"]:
        parts.append(f"{each['error']}: {' '.join((each['message'] or '').split())}")
    elif not each["complete"]:
        parts.append("the client left")
    return "; ".join(parts)


def _tokens(each: dict[str, Any]) -> str:
    prompt, completion = each.get("prompt_tokens"), each.get("completion_tokens")
    return "-" if prompt is None and completion is None else f"{prompt or 0}+{completion or 0}"


def _secs(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s" if value < 10 else f"{value:.1f} s"
