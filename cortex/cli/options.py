"""What several commands share: their options, and asking a running cortex."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.terminal.command_line import fail

DEFAULT_URL = "http://127.0.0.1:31313"
_COMPLETION_TIMEOUT_SECS = 0.5

ConfigFile = Annotated[Path, typer.Option(metavar="FILE", help="The configuration file, cortex.toml.")]
Url = Annotated[str, typer.Option(envvar="CORTEX_URL", help="Address of the running cortex.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would do, and what it would displace.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Print it again every two seconds, until Ctrl-C.")]
_WATCH_SECS = 2.0


def _fetch(ctx: typer.Context, path: str) -> Any:
    """GET for shell completion, None on any failure."""
    from cortex.cli.client import CallFailed, call

    url = str(ctx.params.get("url") or os.environ.get("CORTEX_URL") or DEFAULT_URL)
    try:
        key = credential_for(url)
        return call(url, "GET", path, api_key=key, timeout_secs=_COMPLETION_TIMEOUT_SECS)
    except CallFailed:
        return None


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    try:
        names = [str(entry["id"]) for entry in _fetch(ctx, "/v1/models")["data"]]
    except (LookupError, TypeError):
        return []
    return [name for name in names if name.startswith(incomplete)]


def complete_node(ctx: typer.Context, incomplete: str) -> list[str]:
    try:
        names = [str(node["name"]) for node in _fetch(ctx, "/fleet")["nodes"]]
    except (LookupError, TypeError):
        return []
    return [name for name in names if name.startswith(incomplete)]


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model id or an alias.", autocompletion=complete_model)]
Node = Annotated[str, typer.Argument(metavar="NODE", help="A neuron's name.", autocompletion=complete_node)]
On = Annotated[
    str | None,
    typer.Option("--on", metavar="NODE", help="The neuron. Default: cortex chooses.", autocompletion=complete_node),
]


def ask(url: str, method: str, path: str, body: dict[str, Any] | None = None, *, otherwise: str = "") -> Any:
    """`otherwise`: what users can do instead if cortex does not run, or they have no key for this."""
    from cortex.cli.client import CALL_TIMEOUT_SECS, LOAD_TIMEOUT_SECS, CallFailed, ErrorAnswer, NotConnected, call

    timeout = CALL_TIMEOUT_SECS if body is None else LOAD_TIMEOUT_SECS
    try:
        key = credential_for(url)
        return call(url, method, path, api_key=key, body=body, timeout_secs=timeout)
    except CallFailed as error:
        status = error.status if isinstance(error, ErrorAnswer) else None
        hinted = isinstance(error, NotConnected) or status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        fail("cortex", f"{error}{otherwise}" if hinted and "--config" not in str(error) else error)


def credential_for(url: str) -> str | None:
    """The key in CORTEX_API_KEY, or else the token of `cortex login` for this address. Raises CallFailed."""
    from cortex.cli.sign_in.kept_tokens import token_for

    return os.environ.get("CORTEX_API_KEY") or token_for(url)


def print_answer(url: str, answer: Any, as_json: bool, show: Callable[[Any], str]) -> None:
    import json

    try:
        text = json.dumps(answer, indent=2) if as_json else show(answer)
    except (LookupError, TypeError, AttributeError):
        fail("cortex", f"{url} does not answer like a cortex, check --url")
    sys.stdout.write(f"{text}\n")


def repeated(show: Callable[[], None], watch: bool) -> int:
    """Calls `show` once, or every two seconds on an empty screen; in a pipe one print follows the other."""
    show()
    while watch:
        sys.stdout.flush()
        time.sleep(_WATCH_SECS)
        if sys.stdout.isatty():
            sys.stdout.write("\033[H\033[2J\033[3J")
        show()
    return 0
