"""POST /v1/audio/transcriptions and /v1/audio/translations: multipart forms."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, web

from neuron.sim.api.bodies import served_model
from neuron.sim.api.errors import malformed
from neuron.sim.engine.engine import ENGINE

_BYTES_PER_SEC = 32_000  # of 16 bit mono at 16 kHz, a real model's input


@dataclass
class _Form:
    fields: dict[str, str] = field(default_factory=dict)
    file_name: str | None = None  # None: the form has no file
    size: int = 0
    digest: str = ""


async def speech_to_text(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    if not request.content_type.startswith("multipart/"):
        raise malformed("[{'type': 'missing', 'loc': ('body', 'file'), 'msg': 'Field required'}]", "file")
    form = await _read(request)
    model = served_model(form.fields.get("model"), engine.settings)
    if form.file_name is None:
        raise malformed("[{'type': 'missing', 'loc': ('body', 'file'), 'msg': 'Field required'}]", "file")
    text = f"{model} (simulated) heard {form.file_name}: {form.size} bytes, {form.digest}."
    await engine.read([text])
    if form.fields.get("response_format") == "text":
        return web.Response(text=text)
    seconds = -(-form.size // _BYTES_PER_SEC)
    return web.json_response({"text": text, "usage": {"type": "duration", "seconds": seconds}})


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
    except (ValueError, AssertionError) as error:
        raise malformed(f"There was an error parsing the body: {error}") from error
    return form
