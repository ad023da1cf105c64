"""Reads llama-swap's config.yaml. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from cortex.cli.importing.carried import CarriedOver
from cortex.cli.importing.command_line import expanded, note_environment, read_command
from cortex.cli.importing.yaml_values import as_list, as_table

_ALIAS_CHANGES: Final = "an alias can change requests (docs/configuration.md)"
_OF_A_MODEL: Final = {
    "cmdStop": "neuron ends its engines itself",
    "checkEndpoint": "the engine's description says it: health_path in neuron.toml",
    "unlisted": "cortex lists every model; a key may be limited to some (docs/keys.md)",
    "name": "",
    "description": "",
    "metadata": "",
    "useModelName": "",
    "sendLoadingState": "streams get signs of life while a model loads",
    "timeouts": "[cold_load] timeout_secs and [gateway] in cortex.toml",
}
_OF_ALL: Final = {
    "healthCheckTimeout": "[cold_load] timeout_secs in cortex.toml",
    "logLevel": "log_level in cortex.toml and neuron.toml",
    "logTimeFormat": "",
    "logToStdout": "",
    "logRequests": "",
    "metricsMaxInMemory": "",
    "captureBuffer": "",
    "startPort": "port_range in neuron.toml",
    "sendLoadingState": "streams get signs of life while a model loads",
    "includeAliasesInList": "",
    "apiKeys": "create keys: `cortex keys create NAME`",
    "peers": "cortex serves only models on its own neurons",
    "matrix": "cortex loads what fits, and evicts what was used least recently",
}


def read_llama_swap(config: Mapping[str, Any]) -> CarriedOver:
    """The models and aliases of a parsed config.yaml."""
    found = CarriedOver()
    macros = {str(name): str(value) for name, value in as_table(config.get("macros")).items()}
    global_ttl = config.get("globalTTL")
    for name, model in as_table(config.get("models")).items():
        if isinstance(model, Mapping):
            _read_model(str(name), model, macros, global_ttl, found)
    for name, model in as_table(config.get("models")).items():
        for alias in as_list(as_table(model).get("aliases")):
            if found.model(str(name)) is not None:
                found.add_alias(str(alias), str(name))
    _read_groups(config, found)
    for model_id in as_list(as_table(as_table(config.get("hooks")).get("on_startup")).get("preload")):
        found.note(str(model_id), "preload: set replicas = { min = 1 } to keep it loaded")
    found.leave_out("", dict(config), _OF_ALL, known={"models", "macros", "groups", "hooks", "globalTTL"})
    return found


def _read_model(
    name: str, model: Mapping[str, Any], macros: Mapping[str, str], global_ttl: object, found: CarriedOver
) -> None:
    own = {str(key): str(value) for key, value in as_table(model.get("macros")).items()}
    command = expanded(str(model.get("cmd") or ""), {**macros, **own, "MODEL_ID": name})
    if not command.strip():
        found.note(name, "left out: it has no cmd; cortex serves only models on its own neurons")
        return
    keys = read_command(command, name, found)
    if keys is None:
        return
    table: dict[str, Any] = {"id": name, **keys}
    ttl = model.get("ttl", global_ttl)
    if isinstance(ttl, (int, float)) and ttl > 0:
        table["idle_ttl_secs"] = ttl
    limit = model.get("concurrencyLimit")
    if isinstance(limit, int) and limit > 0:
        table["limit"] = {"parallel": limit}
    note_environment([str(each).partition("=")[0] for each in as_list(model.get("env"))], name, found)
    try:
        host = urlsplit(str(model.get("proxy") or "http://localhost")).hostname
    except ValueError:
        host = "an invalid address"
    if host not in ("localhost", "127.0.0.1", "::1"):
        found.note(name, f"proxy: left out; the engine was at {host}: run a neuron there")
    filters = as_table(model.get("filters"))
    for key in filters:
        found.note(name, f"filters.{key}: left out; {_ALIAS_CHANGES}")
    known = {"cmd", "macros", "ttl", "concurrencyLimit", "env", "proxy", "filters", "aliases"}
    advice = {**_OF_A_MODEL, **({"checkEndpoint": ""} if model.get("checkEndpoint") == "/health" else {})}
    found.leave_out(name, dict(model), advice, known=known)
    found.models.append(table)


def _read_groups(config: Mapping[str, Any], found: CarriedOver) -> None:
    """A persistent group's models are not evicted for those of others, as with a high residency_priority."""
    for name, group in as_table(config.get("groups")).items():
        persistent = as_table(group).get("persistent") is True
        for member in as_list(as_table(group).get("members")):
            table = found.model(str(member))
            if persistent and table is not None:
                table["residency_priority"] = 1000
        if not persistent:
            found.note(
                "", f"groups.{name}: left out; cortex loads all models that fit, and evicts when memory is short"
            )
