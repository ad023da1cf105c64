"""`cortex keys`: asks a running cortex, or with `--config` changes the database that the file names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from cortex.cli.options import DEFAULT_URL, Json, Url, ask, print_answer
from shared.terminal.command_line import CommandGroup, fail

keys_app = typer.Typer(
    name="keys", cls=CommandGroup, help="Create, list, revoke and rotate API keys.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name.")]
Database = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Work on the database of this cortex.toml, whether or not cortex runs. Default: ask the running cortex.",
    ),
]


@keys_app.command()
def create(
    name: Name,
    *,
    models: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Ids of the models that it may use, repeatable. Default: all."),
    ] = None,
    rpm: Annotated[int | None, typer.Option(metavar="N", min=0, help="Requests per minute; 0 allows none.")] = None,
    tpm: Annotated[int | None, typer.Option(metavar="N", min=0, help="Tokens per minute; 0 allows none.")] = None,
    parallel: Annotated[int | None, typer.Option(metavar="N", min=0, help="Requests at a time; 0 allows none.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="BUDGET", help="20EUR/month, 1000000tokens/day, 5EUR/7d (rolling); repeatable."),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB:rpm=N,...", help="Limits for the models that match, repeatable."),
    ] = None,
    priority: Annotated[int, typer.Option(metavar="N", help="Waiting requests with a higher one go first.")] = 0,
    weight: Annotated[float, typer.Option(metavar="X", help="Its share among keys of its priority.")] = 1.0,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="30d, 2027-01-31 or 2027-01-31T12:00:00Z. Default: never.")
    ] = None,
    role: Annotated[str, typer.Option(metavar="ROLE", help="user, viewer, operator or admin.")] = "user",
    admin: Annotated[bool, typer.Option("--admin", help="The same as --role admin.")] = False,
    config: Database = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Create a key. Its secret is shown once."""
    from cortex.accounts.keys.key_terms import parse_model_limits
    from cortex.cli.tables import new_key_text

    try:
        limits = [parse_model_limits(text) for text in limit or []]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--limit") from error
    if len({glob for glob, _ in limits}) < len(limits):
        raise typer.BadParameter("give each GLOB once", param_hint="--limit")
    body = {
        "name": name,
        "role": "admin" if admin else role,
        "models": models or [],
        "rpm": rpm,
        "tpm": tpm,
        "parallel": parallel,
        "budget": budget or [],
        "limits": dict(limits),
        "priority": priority,
        "weight": weight,
        "expires": expires,
    }
    answer = _asked(url, "POST", "/keys", body) if config is None else _directly(config, "create", body)
    print_answer(url, answer, as_json, new_key_text)
    for warning in () if as_json else answer.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


@keys_app.command("list")
def list_keys(config: Database = None, url: Url = DEFAULT_URL, as_json: Json = False) -> int:
    """List the keys and what they allow."""
    from cortex.cli.tables import keys_table

    answer = _asked(url, "GET", "/keys") if config is None else _directly(config, "list", {})
    print_answer(url, answer, as_json, keys_table)
    return 0


@keys_app.command()
def revoke(name: Name, config: Database = None, url: Url = DEFAULT_URL, as_json: Json = False) -> int:
    """Revoke a key, within two seconds everywhere."""
    path = f"/keys/{quote(name, safe='')}"
    answer = _asked(url, "DELETE", path) if config is None else _directly(config, "revoke", {"name": name})
    print_answer(url, answer, as_json, lambda revoked: f"revoked {revoked['name']}")
    return 0


@keys_app.command()
def rotate(name: Name, config: Database = None, url: Url = DEFAULT_URL, as_json: Json = False) -> int:
    """Give a key a new secret. The old one stops within two seconds everywhere."""
    from cortex.cli.tables import new_key_text

    path = f"/keys/{quote(name, safe='')}/rotate"
    answer = _asked(url, "POST", path, {}) if config is None else _directly(config, "rotate", {"name": name})
    print_answer(url, answer, as_json, new_key_text)
    return 0


def _asked(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    return ask(url, method, path, body, otherwise="; on cortex's host, `--config FILE` works without a key")


def _directly(config_file: Path, action: str, body: dict[str, Any]) -> Any:
    """The answer that a running cortex would give."""
    from cortex.accounts.database.source import DatabaseError
    from cortex.cli.accounts import act_on_keys
    from shared.errors import ServiceError
    from shared.settings import SettingsError

    try:
        return act_on_keys(config_file, action, body)
    except DatabaseError as error:
        fail("cortex", f"the key {body['name']!r} was not revoked: {error}" if action == "revoke" else error)
    except (ServiceError, SettingsError, ValueError) as error:
        fail("cortex", error)
