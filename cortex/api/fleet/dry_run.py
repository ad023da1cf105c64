"""What an operator's action would do, asked for with `?dry_run=true`."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from shared.errors import InvalidRequest

_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def is_dry_run(request: web.Request) -> bool:
    """Whether the caller only wants to know what the action would do.

    Raises:
        InvalidRequest: unclear, so nothing must be done.
    """
    text = request.query.get("dry_run", "false").lower()
    if text not in _FLAGS:
        raise InvalidRequest(f"dry_run: must be true or false, got {text!r}", param="dry_run")
    return _FLAGS[text]


def dry_run_answer(model: str, effects: Sequence[str], evict: Sequence[str] = ()) -> web.Response:
    """`effects` are sentences; `evict` are the models that would be displaced."""
    return web.json_response({"dry_run": True, "model": model, "effects": list(effects), "evict": list(evict)})
