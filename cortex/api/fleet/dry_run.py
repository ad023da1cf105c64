"""What an operator's action would do, asked for with `?dry_run=true`."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web


def is_dry_run(request: web.Request) -> bool:
    """Whether the caller only wants to know what the action would do."""
    return request.query.get("dry_run") == "true"


def dry_run_answer(model: str, effects: Sequence[str], evict: Sequence[str] = ()) -> web.Response:
    """`effects` are sentences; `evict` are the models that would be displaced."""
    return web.json_response({"dry_run": True, "model": model, "effects": list(effects), "evict": list(evict)})
