"""POST /v1/audio/transcriptions and /v1/audio/translations: multipart forms."""

from __future__ import annotations

import hashlib
import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from neuron.sim.api.bodies import served_model
from neuron.sim.api.errors import bad_request, malformed
from neuron.sim.api.sse import EventStream
from neuron.sim.engine import tokens
from neuron.sim.engine.engine import ENGINE, Generation, TokenUsage
from neuron.sim.engine.replies import Prompt, Reply

_BYTES_PER_SEC = 32_000  # of 16 bit mono at 16 kHz, a real model's input
_TASKS = {
    "transcriptions": ("transcribe", "transcription.chunk"),
    "translations": ("translate", "translation.chunk"),
}
_BYTES_PER_TOKEN = _BYTES_PER_SEC // 50


@dataclass
class _Form:
    fields: dict[str, str] = field(default_factory=dict)
    file_name: str | None = None  # None: the form has no file
    size: int = 0
    digest: str = ""

    def flag(self, name: str) -> bool:
        return self.fields.get(name, "").lower() in ("true", "1", "yes", "on")


async def speech_to_text(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    if not request.content_type.startswith("multipart/"):
        raise malformed("[{'type': 'missing', 'loc': ('body', 'file'), 'msg': 'Field required'}]", "file")
    form = await _read(request)
    model = served_model(form.fields.get("model"), engine)
    if form.file_name is None:
        raise malformed("[{'type': 'missing', 'loc': ('body', 'file'), 'msg': 'Field required'}]", "file")
    text = f"{model} (simulated) heard {form.file_name}: {form.size} bytes, {form.digest}."
    wanted = form.fields.get("response_format") or "json"
    if wanted not in ("text", "json", "verbose_json"):
        raise bad_request("Currently only support response_format: `text`, `json`, `verbose_json` or `diarized_json`")
    streamed = form.flag("stream")
    if streamed and wanted == "verbose_json":
        raise bad_request("verbose_json format doesn't support streaming case")
    reply = Reply(text)
    generation = Generation(model, (Prompt("", ""),), None, streamed=streamed, reply=reply)
    if streamed:
        return await _stream(request, generation, form)
    await engine.answers(generation)
    if wanted == "text":
        return web.Response(text=text)
    seconds = -(-form.size // _BYTES_PER_SEC)
    if wanted == "json":
        return web.json_response({"text": text, "usage": {"type": "duration", "seconds": seconds}})
    segment = {"id": 0, "seek": 0, "start": 0.0, "end": float(seconds), "text": text, "tokens": tokens.token_ids(text),
               "temperature": 0.0, "avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.0}  # fmt: skip
    language = form.fields.get("language") or "en"
    return web.json_response(
        {"duration": float(seconds), "language": language, "text": text, "segments": [segment], "words": None}
    )


async def _stream(request: web.Request, generation: Generation, form: _Form) -> web.StreamResponse:
    """vLLM's own events, which look like those of chat."""
    stream = EventStream(request)
    await stream.open()
    task, kind = _TASKS[request.path.rpartition("/")[2]]
    identity = {
        "id": f"{task}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": generation.model,
    }
    usage = TokenUsage(-(-form.size // _BYTES_PER_TOKEN))
    async with aclosing(request.app[ENGINE].generate(generation)) as steps:
        async for step in steps:
            if step.finish == "abort":
                await stream.send_aborted()
                break
            usage.completion_tokens += 1
            choice: dict[str, object] = {"delta": {"content": step.text}}
            if step.finish is not None:
                choice |= {"finish_reason": step.finish, "stop_reason": None}
            await stream.send({**identity, "choices": [choice]})
        else:
            if form.flag("stream_include_usage"):
                await stream.send({**identity, "choices": [], "usage": usage.openai()})
    await stream.send("[DONE]")
    return await stream.close()


async def _read(request: web.Request) -> _Form:
    """The form; the file is hashed as it arrives and never held in memory. Raises ApiError 400 when it is broken."""
    form = _Form()
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            if not isinstance(part, BodyPartReader):
                continue
            if part.name != "file":
                form.fields[part.name or ""] = await part.text()
                continue
            form.file_name = part.filename or "a file"
            content = hashlib.sha256()
            while data := await part.read_chunk(65536):
                form.size += len(data)
                content.update(data)
            form.digest = content.hexdigest()[:8]
    except (ValueError, AssertionError, LookupError, RuntimeError, HttpProcessingError) as error:  # all by aiohttp
        raise malformed(f"There was an error parsing the body: {error}") from error
    return form
