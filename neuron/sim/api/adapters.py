"""vLLM 0.32's routes for LoRA adapters, which neuron's guard closes to clients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from aiohttp import web

from neuron.harness.vllm.guard.neuron_guard import LOAD_ADAPTER, UNLOAD_ADAPTER
from neuron.sim.api.bodies import read_json
from neuron.sim.api.errors import ApiError
from neuron.sim.engine import console
from neuron.sim.engine.engine import ENGINE, SimEngine

UPDATING_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def updates_adapters(environ: Mapping[str, str]) -> bool:
    """True when vLLM would open its routes for adapters."""
    return environ.get(UPDATING_VARIABLE, "0").strip().lower() in ("1", "true")


def _refused(message: str, status: int = 400, kind: str = "InvalidUserInput") -> ApiError:
    return ApiError(status, message, kind)


async def _load(request: web.Request) -> web.Response:
    engine, body = request.app[ENGINE], await read_json(request)
    name, path = body.get("lora_name"), body.get("lora_path")
    if not (isinstance(name, str) and name and isinstance(path, str) and path):
        raise _refused("Both 'lora_name' and 'lora_path' must be provided.")
    if name in engine.settings.served_names:
        raise _refused(f"The lora adapter '{name}' conflicts with a served base model.")
    if name in engine.adapters:
        raise _refused(f"The lora adapter '{name}' has already been loaded.")
    _check(engine, name, path)
    engine.adapters[name] = path
    console.log("APIServer", "serving.py:220", f"Loaded new LoRA adapter: name '{name}', path '{path}'")
    return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")


def _check(engine: SimEngine, name: str, path: str) -> None:
    """Raises ApiError when the adapter is missing, or its rank is too high. A name on a hub is taken as it is."""
    if engine.settings.max_loras is None:
        raise _refused("LoRA is not enabled. Use --enable-lora to enable LoRA.", 500, "InternalServerError")
    if not path.startswith("/"):
        return
    try:
        rank = json.loads((Path(path) / "adapter_config.json").read_bytes())["r"]
    except (OSError, ValueError, KeyError, TypeError):
        message = f"Loading lora {name} failed: No adapter found for {path}"
        raise _refused(message, 404, "NotFoundError") from None
    highest = engine.settings.max_lora_rank
    if rank > highest:
        message = f"LoRA rank {rank} is greater than max_lora_rank {highest}."
        raise _refused(f"Call to add_lora method failed: {message}", 500, "InternalServerError")


async def _unload(request: web.Request) -> web.Response:
    engine, name = request.app[ENGINE], (await read_json(request)).get("lora_name")
    if not isinstance(name, str) or name not in engine.adapters:
        raise _refused(f"The lora adapter '{name}' cannot be found.", 404, "NotFoundError")
    del engine.adapters[name]
    console.log("APIServer", "serving.py:243", f"Removed LoRA adapter: name '{name}'")
    return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


def add_adapter_routes(app: web.Application) -> None:
    """Adds vLLM's routes. The guard must be among the app's middlewares."""
    app.router.add_post(LOAD_ADAPTER, _load)
    app.router.add_post(UNLOAD_ADAPTER, _unload)
