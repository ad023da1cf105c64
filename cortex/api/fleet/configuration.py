"""The configuration: what is in force, what is wrong in the files now, and what a reload would change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiohttp import web

from cortex.api.app_keys import LIVE, RELOADER
from cortex.config.catalogue import Catalogue
from cortex.config.diff import RELOAD_OF, Reload
from cortex.config.files import overriding_variables
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from cortex.config.shown import without_secrets
from cortex.control.reload import Outlook, Reloader
from shared.errors import Conflict, NotFound
from shared.protocol import ErrorCode


async def show_configuration(request: web.Request) -> web.Response:
    """Reads the files, but applies nothing."""
    live, reloader = request.app[LIVE], _reloader(request.app)
    outlook = await reloader.outlook()
    return web.json_response(configuration_shown(live, outlook, overriding_variables()))


async def reload_configuration(request: web.Request) -> web.Response:
    """Applies the files now, without waiting until cortex notices a change of them.

    Raises:
        Conflict: they have errors, so nothing has changed.
    """
    live, reloader = request.app[LIVE], _reloader(request.app)
    await reloader.reload()
    if live.error is not None:
        raise Conflict(
            f"the previous configuration stays in force: fix the files and reload again\n{live.error}",
            code=ErrorCode.CONFIGURATION_INVALID,
        )
    outlook = await reloader.outlook()
    return web.json_response(configuration_shown(live, outlook, overriding_variables()))


def _reloader(app: web.Application) -> Reloader:
    reloader = app[RELOADER]
    if reloader is None:
        raise NotFound("this cortex has no configuration files")
    return reloader


def configuration_shown(live: LiveConfig, outlook: Outlook, variables: Iterable[str]) -> dict[str, Any]:
    """The answer. Pure."""
    return {
        "loaded_at": live.loaded_at,
        "files": list(live.files),
        "environment": list(variables),
        "settings": _settings(live.config),
        "neurons": [_shown(entry.model_dump(mode="json", exclude_none=True)) for entry in live.config.neurons],
        **_catalogue(live.catalogue),
        "errors": [_located(problem, live.files) for problem in outlook.errors],
        "warnings": [_located(problem, live.files) for problem in outlook.warnings],
        "reload": {"possible": not outlook.errors, "changes": list(outlook.changes), "restart": list(outlook.restart)},
    }


def _settings(config: CortexConfig) -> list[dict[str, Any]]:
    """Every key of cortex.toml but the neurons."""
    values, defaults = config.model_dump(mode="json"), CortexConfig().model_dump(mode="json")
    found = []
    for key, reload in RELOAD_OF.items():
        if key == "neurons":
            continue
        value = _at(values, key)
        found.append(
            {
                "key": key,
                "value": _shown(value, key.rpartition(".")[2]),
                "default": value == _at(defaults, key),
                "needs_restart": reload is Reload.NEEDS_RESTART,
            }
        )
    return found


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def _catalogue(catalogue: Catalogue) -> dict[str, Any]:
    """Models and aliases with what the file says of them."""
    shown = catalogue.model_dump(mode="json", exclude_unset=True)
    return {"models": _shown(list(shown.get("models", ()))), "aliases": _shown(shown.get("aliases", {}))}


def _shown(value: Any, key: str = "") -> Any:
    return without_secrets(value, key)


def _located(problem: str, files: Iterable[str]) -> dict[str, Any]:
    """A problem with the file and the key that it names, null if it names none."""
    for file in files:
        if problem.startswith(f"{file}: "):
            message = problem[len(file) + 2 :]
            before, colon, _ = message.partition(": ")
            key = before.partition(" = ")[0]
            named = bool(colon) and " " not in key and key != "(file)"
            return {"file": file, "key": key if named else None, "message": message}
    return {"file": None, "key": None, "message": problem}
