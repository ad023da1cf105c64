"""LoRA adapters of a vLLM: the arguments with which it takes them, and the routes that load them at run time.

With `VLLM_ALLOW_RUNTIME_LORA_UPDATING` vLLM opens these routes to every caller that has its API key. The guard opens
them to neuron's control key only. (Read in vLLM 0.32; the routes and the variable are there since 0.6.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from neuron import errors as failures
from neuron.harness.adapters import AdapterControl, EngineAccess
from neuron.harness.vllm.control.request import MAX_QUOTED_CHARACTERS, NO_ANSWER, call, why
from neuron.harness.vllm.guard.neuron_guard import LOAD_ADAPTER, UNLOAD_ADAPTER
from neuron.spec import EngineSpec

UPDATING_VARIABLE: Final = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
UPDATING: Final = {UPDATING_VARIABLE: "True"}

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as `--max-lora-rank`."""
_LOAD_SECS = 600.0  # it may download the adapter
_QUERY_SECS = 10.0
_INFO = re.compile(r"^vllm:lora_requests_info\{(?P<labels>.*)\} (?P<value>\S+)", re.MULTILINE)
_NAMES = re.compile(r'(?:running|waiting)_lora_adapters="(?P<names>[^"]*)"')


def lora_arguments(spec: EngineSpec) -> list[str]:
    """Those of an engine that takes adapters. Its rank is rounded up to one that vLLM accepts."""
    if spec.max_loras is None:
        return []
    argv = ["--enable-lora", "--max-loras", str(spec.max_loras)]
    rank = spec.max_lora_rank or spec.fitted_rank
    if rank is None:
        return argv
    return [*argv, "--max-lora-rank", str(next((each for each in _RANKS if each >= rank), rank))]


class VllmAdapters(AdapterControl):
    """vLLM keeps the weights of as many adapters as run at a time; neuron holds it to that number of names."""

    async def is_guarded(self, http: aiohttp.ClientSession, engine: EngineAccess) -> bool:
        # GET: the route itself would answer 405.
        without_key = EngineAccess(engine.url, engine.api_key, "")
        try:
            status, _ = await _call(http, without_key, "GET", LOAD_ADAPTER, secs=_QUERY_SECS)
            if status != 404:
                raise failures.GuardFailed(
                    f"the engine's routes for adapters answer without the control key: {LOAD_ADAPTER} answered {status}"
                )
            status, _ = await _call(http, engine, "GET", LOAD_ADAPTER, secs=_QUERY_SECS)
        except NO_ANSWER:
            return False
        return status == 405

    async def load(self, http: aiohttp.ClientSession, engine: EngineAccess, name: str, source: str) -> None:
        body = {"lora_name": name, "lora_path": source}
        status, text = await _asked(http, engine, "POST", LOAD_ADAPTER, body=body, secs=_LOAD_SECS)
        if status != 200:
            raise failures.AdapterFailed(f"the engine cannot load the adapter {name!r} from {source!r}: {_said(text)}")

    async def unload(self, http: aiohttp.ClientSession, engine: EngineAccess, name: str) -> None:
        status, text = await _asked(http, engine, "POST", UNLOAD_ADAPTER, body={"lora_name": name}, secs=_QUERY_SECS)
        if status not in (200, 404):
            raise failures.AdapterFailed(f"the engine cannot unload the adapter {name!r}: {_said(text)}")

    async def present(self, http: aiohttp.ClientSession, engine: EngineAccess) -> frozenset[str]:
        status, text = await _asked(http, engine, "GET", "/v1/models", secs=_QUERY_SECS)
        try:
            entries: list[dict[str, Any]] = json.loads(text)["data"]
            return frozenset(entry["id"] for entry in entries if entry.get("parent") is not None)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise failures.AdapterFailed(f"the engine does not list its adapters: it answered {status}") from None

    async def busy(self, http: aiohttp.ClientSession, engine: EngineAccess) -> frozenset[str]:
        _, text = await _asked(http, engine, "GET", "/metrics", secs=_QUERY_SECS)
        return busy_adapters(text)

    def rank_of(self, config: Mapping[str, Any]) -> int | None:
        pattern = config.get("rank_pattern")
        ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
        return max((rank for rank in ranks if isinstance(rank, int) and not isinstance(rank, bool)), default=None)


def busy_adapters(exposition: str) -> frozenset[str]:
    """The adapters that have requests, running or waiting, from a metrics page. vLLM keeps a line for each combination
    that there has been; the value is the time of the last."""
    lines = [(float(found["value"]), found["labels"]) for found in _INFO.finditer(exposition)]
    if not lines:
        return frozenset()
    names = (found["names"] for found in _NAMES.finditer(max(lines)[1]))
    return frozenset(name for listed in names for name in listed.split(",") if name)


async def _asked(
    http: aiohttp.ClientSession, engine: EngineAccess, method: str, path: str, *, secs: float, body: object = None
) -> tuple[int, str]:
    """Status and text of the answer. Raises AdapterFailed if there is none."""
    try:
        return await _call(http, engine, method, path, secs=secs, body=body)
    except NO_ANSWER as error:
        raise failures.AdapterFailed(f"the engine did not answer {path}: {why(error, secs)}") from error


async def _call(
    http: aiohttp.ClientSession, engine: EngineAccess, method: str, path: str, *, secs: float, body: object = None
) -> tuple[int, str]:
    url, key = engine.url + path, engine.control_key or None
    return await call(http, method, url, control_key=key, secs=secs, api_key=engine.api_key, body=body)


def _said(text: str) -> str:
    """The message of vLLM's error, or what there is of the answer."""
    try:
        return str(json.loads(text)["error"]["message"])[:MAX_QUOTED_CHARACTERS]
    except (ValueError, TypeError, KeyError):
        return text[:MAX_QUOTED_CHARACTERS]
