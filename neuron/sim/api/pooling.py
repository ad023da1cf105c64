"""Endpoints of models that do not generate text: embeddings, pooling, classify, rerank, score."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Sequence

from aiohttp import web

from neuron.sim.api.bodies import (
    Body,
    check_length,
    conversation,
    integer,
    read_json,
    required,
    served_model,
    text_list,
)
from neuron.sim.api.errors import bad_request, malformed
from neuron.sim.engine.engine import ENGINE, SimEngine
from neuron.sim.engine.replies import Prompt
from neuron.sim.engine.vectors import embed, normalised, similarity

_LABELS = ("LABEL_0", "LABEL_1")


async def embeddings(request: web.Request) -> web.Response:
    """POST /v1/embeddings; `dimensions` truncates the vectors, as for matryoshka models."""
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine)
    texts = _texts(body, engine)
    dims = integer(body, "dimensions", least=1) or engine.settings.embedding_dims
    if dims > engine.settings.embedding_dims:
        raise bad_request(f"dimensions must be at most {engine.settings.embedding_dims}.", "dimensions")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise malformed("[{'type': 'literal_error', 'loc': ('body', 'encoding_format')}]", "encoding_format")
    read = await engine.read(texts)
    vectors = [normalised(embed(text, engine.settings.embedding_dims)[:dims]) for text in texts]
    data: list[dict[str, object]] = [
        {"index": index, "object": "embedding", "embedding": _base64(vector) if encoding == "base64" else vector}
        for index, vector in enumerate(vectors)
    ]
    return web.json_response(_listing("embd", model, data, read))


async def pooling(request: web.Request) -> web.Response:
    """POST /pooling: the same vectors as embeddings."""
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine)
    texts = _texts(body, engine)
    read = await engine.read(texts)
    data: list[dict[str, object]] = [
        {"index": index, "object": "pooling", "data": embed(text, engine.settings.embedding_dims)}
        for index, text in enumerate(texts)
    ]
    return web.json_response(_listing("pool", model, data, read))


async def classify(request: web.Request) -> web.Response:
    """POST /classify: two classes."""
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine)
    texts = _texts(body, engine)
    read = await engine.read(texts)
    data: list[dict[str, object]] = []
    for index, text in enumerate(texts):
        first = (1 + embed(text, engine.settings.embedding_dims)[0]) / 2
        probs = [first, 1 - first]
        label = _LABELS[probs.index(max(probs))]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(_LABELS)})
    return web.json_response(_listing("classify", model, data, read))


async def rerank(request: web.Request) -> web.Response:
    """POST /rerank, /v1/rerank, /v2/rerank: best first, `top_n` of them."""
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine)
    query = text_list(required(body, "query"), "query")[0]
    documents = _documents(required(body, "documents"))
    top = integer(body, "top_n") or len(documents)
    read = await engine.read([query, *documents])
    dims = engine.settings.embedding_dims
    results: list[dict[str, object]] = [
        {"index": index, "document": {"text": text}, "relevance_score": similarity(query, text, dims)}
        for index, text in enumerate(documents)
    ]
    results.sort(key=_relevance, reverse=True)
    return web.json_response(
        {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "usage": _usage(read), "results": results[:top]}
    )


async def score(request: web.Request) -> web.Response:
    """POST /score, /v1/score: one text against many, or pairs when both sides have the same number."""
    engine = request.app[ENGINE]
    body = await read_json(request)
    model = served_model(body.get("model"), engine)
    left = _documents(_either(body, "text_1", "queries"))
    right = _documents(_either(body, "text_2", "documents"))
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise bad_request("Input lengths must be either 1:1, 1:N or N:N")
    read = await engine.read([*left, *right])
    dims = engine.settings.embedding_dims
    data: list[dict[str, object]] = [
        {"index": index, "object": "score", "score": similarity(one, other, dims)}
        for index, (one, other) in enumerate(zip(left, right, strict=True))
    ]
    return web.json_response(_listing("score", model, data, read))


def _texts(body: Body, engine: SimEngine) -> list[str]:
    """`input`, or the conversation in `messages`, each within the context length."""
    if body.get("input") is None and body.get("messages") is not None:
        texts = [conversation(body["messages"]).text]
    else:
        texts = text_list(required(body, "input"), "input")
    check_length(None, [Prompt(text, "") for text in texts], engine.settings, "input")
    return texts


def _documents(value: object) -> list[str]:
    """Texts given as strings or as objects with a `text`."""
    items = value if isinstance(value, list) else [value]
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    return text_list(texts, "documents")


def _either(body: Body, key: str, other: str) -> object:
    return body[other] if body.get(other) is not None else required(body, key)


def _relevance(result: dict[str, object]) -> float:
    score = result["relevance_score"]
    return score if isinstance(score, float) else 0.0


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(read: int) -> dict[str, int]:
    return {"prompt_tokens": read, "total_tokens": read}


def _listing(prefix: str, model: str, data: list[dict[str, object]], read: int) -> dict[str, object]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {**_usage(read), "completion_tokens": 0, "prompt_tokens_details": None},
    }
