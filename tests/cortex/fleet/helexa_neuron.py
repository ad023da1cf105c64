"""A stand-in for helexa's neuron of August 2026, with its answers: `python -m tests.cortex.fleet.helexa_neuron PORT`.

It is its own engine: models are parts of its process, and all share its URL. It speaks protocol v1 and sends more.
`POST /test` is the tests' own: `{"evict": ID}`, `{"recovering": ID, "secs": N}`, `{"servable": {…}}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from aiohttp import web

LOAD_SECS = 0.2
LIMITS = {"max_in_flight": 4, "max_queue_depth": 2, "anon_max_in_flight": 3}
REJECTIONS = ("queue_full", "timeout", "per_principal", "anon_yield", "kv_timeout", "kv_unservable")
TOKENS = ("Hel", "lo", " there")


class HelexaNeuron:
    """The models that are loaded, by id."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.started = time.monotonic()
        self.models: dict[str, dict[str, Any]] = {}
        self.in_flight = 0
        self.most = 0
        self.servable: dict[str, Any] | None = None

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/version", self.version),
                web.get("/discovery", self.discovery),
                web.get("/health", self.health),
                web.get("/models", self.list_models),
                web.post("/models/load", self.load),
                web.post("/models/unload", self.unload),
                web.get("/models/{model_id}/endpoint", self.endpoint),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/responses", self.responses),
                web.post("/test", self.test),
            ]
        )
        return app

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"git_sha": "91255619", "features": ["cuda"]})

    async def discovery(self, _: web.Request) -> web.Response:
        devices = [{"index": 0, "name": "RTX 4090", "vram_total_mb": 24564, "compute_capability": "8.9"}]
        host = {
            "hostname": "benjy",
            "os": "Fedora 44",
            "kernel": "6.18",
            "cuda_version": "13.0",
            "driver_version": None,
        }
        host |= {"driver_version": "580.95"}
        return web.json_response({**host, "devices": devices, "harnesses": ["candle"], "max_prompt_tokens": 0})

    async def health(self, _: web.Request) -> web.Response:
        failed = [{"model_id": "org/gone", "error": "repo not found"}]
        activation = {"state": "ready", "pending": [], "in_progress": None, "completed": [], "failed": failed}
        figures = {"index": 0, "vram_used_mb": 900, "vram_free_mb": 23664, "utilization_pct": 3, "temp_c": 41}
        admission = {"in_flight": self.in_flight, "queue_depth": 0, **LIMITS, "tok_s_decode": 31.5}
        admission |= {f"rejected_{reason}": 0 for reason in REJECTIONS}
        return web.json_response(
            {
                "uptime_secs": int(time.monotonic() - self.started),
                "devices": [figures],
                "activation": activation,
                "models": [{"id": model_id, **admission} for model_id in self.models],
            }
        )

    async def list_models(self, _: web.Request) -> web.Response:
        return web.json_response([self._entry(model_id, model) for model_id, model in self.models.items()])

    def _entry(self, model_id: str, model: dict[str, Any]) -> dict[str, Any]:
        entry = {
            **{"id": model_id, "harness": "candle", "status": model["status"], "devices": [0], "vram_used_mb": None},
            **{"capabilities": ["text", "vision"], "tool_call": True, "reasoning": True},
            "limit": {"context": 32768, "input": 28000, "output": 4096},
        }
        return entry if self.servable is None else {**entry, "servable": self.servable}

    async def load(self, request: web.Request) -> web.Response:
        spec = await request.json()
        model_id = spec["model_id"]
        if spec.get("harness") != "candle":
            return web.json_response({"error": f"no harness {spec.get('harness')!r}"}, status=400)
        if model_id in self.models:
            return web.json_response({"error": f"model '{model_id}' already loaded"}, status=400)
        if model_id == "org/broken":
            problem = {"kind": "quant_not_found", "model_id": model_id, "suggestion": "Q4_K_M"}
            return web.json_response({"error": problem}, status=422)
        await asyncio.sleep(LOAD_SECS)
        self.models[model_id] = {"status": "loaded"}
        return web.json_response({"status": "loaded"})

    async def unload(self, request: web.Request) -> web.Response:
        model_id = (await request.json())["model_id"]
        if self.models.pop(model_id, None) is None:
            return web.json_response({"error": f"model '{model_id}' not found on any harness"}, status=404)
        return web.json_response({"status": "unloaded"})

    async def endpoint(self, request: web.Request) -> web.Response:
        model_id = request.match_info["model_id"]
        if model_id not in self.models:
            return web.json_response({"error": f"model '{model_id}' not loaded"}, status=404)
        return web.json_response({"url": self.url})

    async def test(self, request: web.Request) -> web.Response:
        order = await request.json()
        if "evict" in order:
            del self.models[order["evict"]]
        if "recovering" in order:
            model = self.models[order["recovering"]]
            model["status"] = "recovering"
            asyncio.get_running_loop().call_later(order["secs"], model.update, {"status": "loaded"})
        if "servable" in order:
            self.servable = order["servable"]
        return web.json_response({"most": self.most})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._chat_events, self._chat_answer)

    async def responses(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._response_events, self._response_answer)

    async def _infer(self, request: web.Request, events: Any, answer: Any) -> web.StreamResponse:
        body = await request.json()
        model = self.models.get(body["model"])
        if model is not None and model["status"] == "recovering":
            return _refused(503, "model_recovering", "the model is being loaded again")
        if model is None:
            return _refused(404, "model_not_found", f"model '{body['model']}' not loaded on this neuron")
        if self.in_flight >= LIMITS["anon_max_in_flight"]:
            return _refused(503, "rate_limit_exceeded", "no seat for anonymous requests")
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if not body.get("stream"):
                await asyncio.sleep(0.02)
                return web.json_response(answer(body["model"]))
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await response.prepare(request)
            await response.write(b":\n\n")  # while it reads the prompt
            for event in events(body["model"]):
                await response.write(event)
                await asyncio.sleep(float(body.get("pause", 0)))
            await response.write_eof()
        finally:
            self.in_flight -= 1
        return response

    def _chat_events(self, model: str) -> list[bytes]:
        base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
        chunks = [{**base, "choices": [{"index": 0, "delta": {"content": text}}]} for text in TOKENS]
        return [*(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks), b"data: [DONE]\n\n"]

    def _chat_answer(self, model: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(TOKENS)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
        return {"id": "chatcmpl-1", "object": "chat.completion", "model": model, "choices": choices, "usage": usage}

    def _response_events(self, model: str) -> list[bytes]:
        deltas: list[tuple[str, dict[str, Any]]] = [("response.output_text.delta", {"delta": text}) for text in TOKENS]
        done: tuple[str, dict[str, Any]] = ("response.completed", {"response": self._response_answer(model)})
        return [
            f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode() for name, data in (*deltas, done)
        ]

    def _response_answer(self, model: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": "".join(TOKENS)}]
        output = [{"type": "message", "role": "assistant", "content": content}]
        return {"id": "resp_1", "object": "response", "model": model, "status": "completed", "output": output}


def _refused(status: int, code: str, message: str) -> web.Response:
    error = {"message": message, "type": "api_error", "code": code, "param": None}
    return web.json_response({"error": error}, status=status, headers={"Retry-After": "1"} if status == 503 else None)


if __name__ == "__main__":
    web.run_app(
        HelexaNeuron(int(sys.argv[1])).app(),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=None,
        print=None,
        reuse_address=True,
    )
