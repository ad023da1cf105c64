"""Reads LiteLLM's config.yaml. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from cortex.cli.importing.carried import CarriedOver
from cortex.cli.importing.yaml_values import as_list, as_number, as_table

_HARNESSES: Final = {"hosted_vllm": "vllm", "vllm": "vllm", "infinity": "infinity", "sglang": "sglang"}
_UNCLEAR: Final = ("openai", "text-completion-openai", "custom_openai", "openai_like", "litellm_proxy", "huggingface")
"""Providers that may be an engine of one's own."""
_CLOUDS: Final = (
    "openai.com", "azure.com", "anthropic.com", "openrouter.ai", "groq.com", "mistral.ai", "together.xyz",
    "fireworks.ai", "deepseek.com", "googleapis.com", "amazonaws.com", "perplexity.ai", "x.ai", "huggingface.co",
)  # fmt: skip
_DEFAULTS: Final = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "presence_penalty",
    "frequency_penalty", "reasoning_effort", "extra_body",
)  # fmt: skip
_IN_ENVIRONMENT: Final = "os.environ/"
_NO_NOTE: Final = {"api_key": "", "api_base": "", "custom_llm_provider": "", "model": ""}
_OF_ALL: Final = {
    "general_settings": "create keys with `cortex keys create NAME`; cortex.toml names the database",
    "litellm_settings": "see docs/migration.md for what cortex has instead",
    "environment_variables": "",
    "mcp_servers": "cortex has no MCP gateway",
    "guardrails": "cortex has no guardrails",
    "credential_list": "",
}


def read_litellm(config: Mapping[str, Any]) -> CarriedOver:
    """The models and aliases of a parsed config.yaml."""
    found = CarriedOver()
    for entry in as_list(config.get("model_list")):
        if isinstance(entry, Mapping):
            _read_entry(entry, found)
    router, settings = as_table(config.get("router_settings")), as_table(config.get("litellm_settings"))
    for alias, target in as_table(router.get("model_group_alias")).items():
        name = target.get("model") if isinstance(target, Mapping) else target
        model_id = found.target(str(name)) or str(name)
        if found.model(model_id) is None:
            found.note(str(alias), f"the alias for {name!r} is left out: that model is not carried over")
        else:
            found.add_alias(str(alias), model_id, **found.changes(str(name)))
    for table in (router, settings):
        for key in table:
            if key.endswith("fallbacks"):
                found.note(
                    "", f"{key}: left out; cortex sends a request to another engine of its model, to no other model"
                )
    left = [key for key in router if key != "model_group_alias" and not key.endswith("fallbacks")]
    if left:
        found.note("", f"router_settings ({', '.join(left)}): left out; cortex chooses the engine by itself")
    rest = [key for key in settings if not key.endswith("fallbacks")]
    if rest:
        found.note("", f"litellm_settings ({', '.join(rest)}): left out")
    found.leave_out("", dict(config), _OF_ALL, known={"model_list", "router_settings", "litellm_settings"})
    return found


def _read_entry(entry: Mapping[str, Any], found: CarriedOver) -> None:
    name, parameters = str(entry.get("model_name") or ""), as_table(entry.get("litellm_params"))
    provider, rest = _provider_and_model(parameters)
    reason = _why_not(name, provider, rest, parameters)
    if reason is not None:
        found.note(name, f"left out: {reason}")
        return
    harness = _HARNESSES.get(provider, "vllm")
    if harness != "vllm":
        found.harnesses.add(harness)
    table = found.model(rest)
    if table is None:
        table = {"id": rest, "harness": harness}
        found.models.append(table)
        if provider in _UNCLEAR:
            found.note(rest, f"{provider} does not say which engine it is: harness = {harness!r} is a guess")
            variable = _variable(parameters.get("api_base"))
            if variable:
                found.note(rest, f"its address is in the variable {variable}: delete this model if that is a service")
    else:
        _count_replica(table, name, rest, found)
    _read_numbers(table, entry, parameters, found)
    defaults = {key: parameters[key] for key in _DEFAULTS if parameters.get(key) is not None}
    extra = defaults.pop("extra_body", {})
    changes = {**(extra if isinstance(extra, dict) else {}), **defaults}
    other = name if found.model(name) is not None else found.target(name)
    if other not in (None, rest):
        found.note(
            name,
            f"LiteLLM sends some of its requests to {rest!r}: left out, as a name stands for one model in cortex; "
            f"{name!r} stays {other!r}, and clients can request {rest!r} by its id",
        )
    elif name and name != rest:
        found.add_alias(name, rest, **({"default": changes} if changes else {}))
    elif changes:
        found.note(rest, f"{', '.join(changes)}: left out; make an alias with `default` for them")
    known = {*_DEFAULTS, "rpm", "tpm", "max_parallel_requests", "input_cost_per_token", "output_cost_per_token"}
    found.leave_out(rest, dict(parameters), _NO_NOTE, known=known)


def _provider_and_model(parameters: Mapping[str, Any]) -> tuple[str, str]:
    """`custom_llm_provider` names the provider if it is given; otherwise the first part of `model` does."""
    model, provider = str(parameters.get("model") or ""), str(parameters.get("custom_llm_provider") or "")
    if provider:
        return provider, model.removeprefix(f"{provider}/")
    prefix, _, rest = model.partition("/")
    return prefix, rest


def _variable(value: object) -> str:
    """The environment variable of `os.environ/NAME`; "" for another value."""
    text = str(value or "")
    return text.removeprefix(_IN_ENVIRONMENT) if text.startswith(_IN_ENVIRONMENT) else ""


def _why_not(name: str, provider: str, rest: str, parameters: Mapping[str, Any]) -> str | None:
    """Why the model cannot be one of cortex's; None if it can."""
    address = parameters.get("api_base")
    try:
        host = urlsplit(str(address or "")).hostname or ""
    except ValueError:
        return "its api_base is not an address"
    if "*" in name or "*" in rest:
        return "cortex has no wildcards; write each model"
    if provider in ("ollama", "ollama_chat"):
        return "import it from Ollama itself: `cortex import ollama`"
    if provider not in _HARNESSES and (provider not in _UNCLEAR or not (host or _variable(address))):
        return f"{provider or 'its provider'} is a service; cortex serves only models on its own neurons"
    if any(host == each or host.endswith(f".{each}") for each in _CLOUDS):
        return f"{host} is a service; cortex serves only models on its own neurons"
    return None if rest else "it names no model"


def _count_replica(table: dict[str, Any], name: str, model_id: str, found: CarriedOver) -> None:
    """A further deployment of one model."""
    if name == model_id or found.aliases.get(name) is not None:
        replicas = table.setdefault("replicas", {"max": 1})
        replicas["max"] += 1


def _read_numbers(
    table: dict[str, Any], entry: Mapping[str, Any], parameters: Mapping[str, Any], found: CarriedOver
) -> None:
    info = as_table(entry.get("model_info"))
    limit: dict[str, Any] = table.pop("limit", {})

    def number(source: Mapping[str, Any], key: str, least: int) -> float | None:
        """None, with a note, for what cannot be a limit or a price."""
        value, read = source.get(key), as_number(source.get(key))
        if value is not None and (read is None or read < least):
            found.note(table["id"], f"{key} = {value!r}: left out; it must be a number of at least {least}")
            return None
        return read

    for key, ours in (("rpm", "rpm"), ("tpm", "tpm"), ("max_parallel_requests", "parallel")):
        value = number(parameters, key, 1)
        if value is not None:  # of each deployment
            limit[ours] = limit.get(ours, 0) + int(value)
    for key, ours in (("max_input_tokens", "context"), ("max_tokens", "context"), ("max_output_tokens", "output")):
        value = number(info, key, 1)
        if value is not None and ours not in limit:
            limit[ours] = int(value)
    prices: dict[str, Any] = table.pop("prices", {})
    for key, ours in (("input_cost_per_token", "input"), ("output_cost_per_token", "output")):
        value = number(info if parameters.get(key) is None else parameters, key, 0)
        if value is not None:
            prices[ours] = round(value * 1_000_000, 6)
    if prices:
        table["prices"] = prices
    if limit:
        table["limit"] = limit
