"""The WebSocket `/v1/realtime`: audio in, its transcription out, with vLLM's messages."""

from __future__ import annotations

import json
import time
import uuid
from contextlib import aclosing

from aiohttp import WSMsgType, web

from neuron.sim.api.bodies import served_model
from neuron.sim.api.errors import ApiError, bad_request
from neuron.sim.engine.engine import ENGINE, Generation, TokenUsage
from neuron.sim.engine.replies import Prompt, Reply

_MAX_MESSAGE_BYTES = 16 << 20
_BYTES_PER_TOKEN = 640  # 16 bit mono at 16 kHz, 50 tokens a second


async def realtime(request: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse(max_msg_size=_MAX_MESSAGE_BYTES)
    if not socket.can_prepare(request).ok:
        raise web.HTTPUpgradeRequired
    model = served_model(request.query.get("model"), request.app[ENGINE])
    await socket.prepare(request)
    await socket.send_json({"type": "session.created", "id": f"sess-{uuid.uuid4().hex}", "created": int(time.time())})
    heard = 0
    async for message in socket:
        if message.type is not WSMsgType.TEXT:
            continue
        try:
            event = _event(message.data)
            match event.get("type"):
                case "session.update":
                    model = served_model(event.get("model") or model, request.app[ENGINE])
                case "input_audio_buffer.append":
                    heard += len(str(event.get("audio") or "")) * 3 // 4  # base64
                case "input_audio_buffer.commit":
                    if event.get("final"):
                        await _transcribe(request, socket, model, heard)
                        heard = 0
                case kind:
                    raise bad_request(f"Unknown event type: {kind}")
        except ApiError as error:
            await socket.send_json({"type": "error", "error": error.message, "code": error.kind})
    return socket


def _event(text: str) -> dict[str, object]:
    try:
        event = json.loads(text)
    except ValueError as error:
        raise bad_request(f"Invalid JSON: {error}") from error
    if not isinstance(event, dict):
        raise bad_request("An event must be a JSON object")
    return event


async def _transcribe(request: web.Request, socket: web.WebSocketResponse, model: str, heard: int) -> None:
    """Sends the words one by one, then all of them."""
    reply = Reply(f"{model} (simulated) heard {heard} bytes.")
    generation = Generation(model, (Prompt("", ""),), None, streamed=True, reply=reply)
    text, usage = "", TokenUsage(-(-heard // _BYTES_PER_TOKEN))
    async with aclosing(request.app[ENGINE].generate(generation)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await socket.send_json({"type": "error", "error": "the engine is shutting down", "code": "aborted"})
                return
            text += step.text
            usage.completion_tokens += 1
            await socket.send_json({"type": "transcription.delta", "delta": step.text})
    await socket.send_json({"type": "transcription.done", "text": text, "usage": usage.openai()})
