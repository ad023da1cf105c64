"""POST /tokenize and /detokenize."""

from __future__ import annotations

from aiohttp import web

from neuron.sim.api.bodies import conversation, read_json, required, served_model, text_list
from neuron.sim.api.errors import malformed
from neuron.sim.api.tools import with_tools
from neuron.sim.engine import tokens
from neuron.sim.engine.engine import ENGINE


async def tokenize(request: web.Request) -> web.Response:
    settings = request.app[ENGINE].settings
    body = await read_json(request)
    served_model(body.get("model"), request.app[ENGINE])
    if body.get("prompt") is None and body.get("messages") is not None:
        text = with_tools(conversation(body["messages"]), body).text
    else:
        text = text_list(required(body, "prompt"), "prompt")[0]
    ids = tokens.token_ids(text)
    strings = tokens.pieces(text) if body.get("return_token_strs") is True else None
    return web.json_response(
        {"count": len(ids), "max_model_len": settings.max_model_len, "tokens": ids, "token_strs": strings}
    )


async def detokenize(request: web.Request) -> web.Response:
    body = await read_json(request)
    served_model(body.get("model"), request.app[ENGINE])
    ids = required(body, "tokens")
    if not isinstance(ids, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise malformed("[{'type': 'list_type', 'loc': ('body', 'tokens')}]", "tokens")
    return web.json_response({"prompt": tokens.text_of(ids)})
