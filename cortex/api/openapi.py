"""`GET /openapi.json`: cortex's HTTP API in OpenAPI 3.1, for client generators and API explorers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from cortex.accounts.keys.key_terms import KeyTerms
from cortex.accounts.usage.query import ENERGY_GROUPS, ENERGY_KINDS, GROUPS
from cortex.api.authorization import NEEDED_ROLES
from cortex.api.engine_actions import EngineAction, RestartAction
from cortex.api.fleet.requests import DEFAULT_REQUESTS, MOST_REQUESTS
from cortex.api.operator import LoadAction, UnloadAction
from cortex.proxy.paths import INFERENCE_PATHS
from shared import __version__
from shared.protocol import MAX_MODEL_ID_CHARS, Registration

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_MODEL = {"type": "string", "minLength": 1, "maxLength": MAX_MODEL_ID_CHARS, "description": "A model id or an alias."}
_ANY_OBJECT = {"type": "object"}
_PAGE = ("text/html",)


@dataclass(frozen=True)
class Operation:
    """One route. `answer` is the schema of its 200, `query` maps a parameter to its description."""

    summary: str
    tag: str
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    required_query: frozenset[str] = frozenset()
    answer: Mapping[str, Any] = field(default_factory=lambda: _ANY_OBJECT)
    content_types: tuple[str, ...] = ("application/json",)
    error: Mapping[str, Any] = field(default_factory=lambda: _ERROR)

    def document(self, path: str) -> dict[str, Any]:
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        parameters: list[dict[str, Any]] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
        parameters += [
            {
                "name": name,
                "in": "query",
                "description": text,
                "required": name in self.required_query,
                "schema": {"type": "string"},
            }
            for name, text in self.query.items()
        ]
        answers = {
            "200": {
                "description": "Success.",
                "content": {
                    kind: {"schema": self.answer if kind == "application/json" else {"type": "string"}}
                    for kind in self.content_types
                },
            },
            "default": {"description": "An error.", "content": {"application/json": {"schema": self.error}}},
        }
        found: dict[str, Any] = {"summary": self.summary, "tags": [self.tag], "responses": answers}
        if parameters:
            found["parameters"] = parameters
        if self.body is not None:
            found["requestBody"] = {"required": True, "content": self.body}
        return found


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _model_body(model: type[BaseModel]) -> dict[str, Any]:
    return _json(model.model_json_schema())


def _inference(path: str) -> Operation:
    if "/audio/" in path:
        properties = {"model": _MODEL, "file": {"type": "string", "format": "binary"}}
        form = {"type": "object", "required": ["model", "file"], "properties": properties}
        return Operation("Passed on to an engine of the model.", "inference", {"multipart/form-data": {"schema": form}})
    properties = {"model": _MODEL, "stream": {"type": "boolean"}}
    schema = {"type": "object", "required": ["model"], "properties": properties, "additionalProperties": True}
    return Operation(
        "Passed on to an engine of the model, which defines all other fields.",
        "inference",
        _json(schema),
        content_types=("application/json", "text/event-stream"),
        error=_ANTHROPIC_ERROR if path.startswith("/v1/messages") else _ERROR,
    )


_BETWEEN = {
    "from": "A time in ISO 8601 or seconds since 1970, or how long ago: 7d, 24h. Default: 30 days before `to`.",
    "to": "Likewise; not included. Default: now.",
}


def _organization(summary: str) -> Operation:
    return Operation(
        f"{summary} In OpenAI's shape; a key with the role user sees itself only.",
        "usage",
        query={
            "start_time": "Seconds since 1970.",
            "end_time": "Likewise; not included. Default: now.",
            "bucket_width": "1m, 1h or 1d; costs only 1d, which is the default.",
            "group_by": "model and api_key_id.",
            "models": "Only these models.",
            "api_key_ids": "Only these keys, by id or name.",
            "batch": "`true`: only batch jobs, of which there are none.",
            "limit": "Buckets of a page.",
            "page": "`next_page` of the page before.",
        },
        required_query=frozenset({"start_time"}),
    )


_DRY_RUN = {"dry_run": "`true` only says what it would do."}
_WAIT = {"wait": "`false` answers 202 at once."}

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    **{("POST", path): _inference(path) for path in INFERENCE_PATHS},
    ("GET", "/v1/models"): Operation(
        "The models that can be used; with the header `anthropic-version`, a page of them in Anthropic's shape.",
        "models",
        query={
            "limit": "Only for Anthropic's shape: entries of the page, 1 to 1000.",
            "after_id": "Likewise: the last id of the previous page.",
            "before_id": "Likewise: the first id of the next page.",
        },
    ),
    ("GET", "/v1/models/{model_id}"): Operation("One model.", "models"),
    ("GET", "/health"): Operation("200 while at least one neuron is healthy, 503 otherwise.", "fleet"),
    ("GET", "/fleet"): Operation("Neurons, devices, models, loads and requests.", "fleet"),
    ("GET", "/fleet/events"): Operation(
        "The fleet after every change, as server-sent events.",
        "fleet",
        query={"changes": "`true` sends the fleet once, and then only what changes."},
        content_types=("text/event-stream",),
    ),
    ("GET", "/fleet/explain"): Operation(
        "What a request for the model would do now, and why.",
        "fleet",
        query={"model": "A model id or an alias."},
        required_query=frozenset({"model"}),
    ),
    ("GET", "/fleet/timeline"): Operation(
        "Which model was where, failures, and who waited, in the last 24 hours.",
        "fleet",
        query={"from": "Unix time. Default: 24 hours ago.", "to": "Unix time. Default: now."},
    ),
    ("GET", "/fleet/requests"): Operation(
        "The requests that engines answer: live ones, and the last that have ended. A key with the role user sees its "
        "own only.",
        "fleet",
        query={
            "model": "Only for this model, by id or as the client named it.",
            "key": "Only of this key, by name or id.",
            "node": "Only at engines of this neuron.",
            "status": "`error`, or an HTTP status: only those that ended so.",
            "limit": f"The most of each kind, 1 to {MOST_REQUESTS}. Default: {DEFAULT_REQUESTS}.",
            "since": "`place` of an earlier answer: only what has ended since.",
        },
    ),
    ("GET", "/fleet/logs"): Operation(
        "What the engines of a model write, last or as it comes.",
        "fleet",
        query={
            "model": "A model id or an alias.",
            "node": "Only on this neuron.",
            "instance": "Only this engine of the neuron.",
            "tail": "How many of the last lines of each neuron. Default: 200.",
            "follow": "`true` sends server-sent events, a line in each, until the engines are gone.",
        },
        required_query=frozenset({"model"}),
    ),
    ("POST", "/fleet/register"): Operation(
        "A neuron announces itself, with the registration token as its bearer token.",
        "fleet",
        _model_body(Registration),
    ),
    ("GET", "/fleet/configuration"): Operation(
        "What is in force, what is wrong in the files, and what a reload would change.", "configuration"
    ),
    ("POST", "/fleet/configuration/reload"): Operation("Reads the files and applies them.", "configuration"),
    ("POST", "/fleet/load"): Operation(
        "Loads a model.",
        "operator",
        _model_body(LoadAction),
        query={**_WAIT, **_DRY_RUN},
    ),
    ("POST", "/fleet/unload"): Operation("Unloads a model.", "operator", _model_body(UnloadAction), query=_DRY_RUN),
    ("POST", "/fleet/sleep"): Operation(
        "Puts a model's engines to sleep.", "operator", _model_body(EngineAction), query=_DRY_RUN
    ),
    ("POST", "/fleet/wake"): Operation(
        "Wakes a model's engines.", "operator", _model_body(EngineAction), query=_DRY_RUN
    ),
    ("POST", "/fleet/restart"): Operation(
        "Restarts a model's engines.", "operator", _model_body(RestartAction), query={**_WAIT, **_DRY_RUN}
    ),
    ("POST", "/fleet/nodes/{name}/drain"): Operation(
        "Stops sending new loads to a neuron, and requests if another neuron can serve them.", "operator"
    ),
    ("POST", "/fleet/nodes/{name}/resume"): Operation("Ends a drain.", "operator"),
    ("GET", "/keys"): Operation("The API keys, without their secrets.", "keys"),
    ("POST", "/keys"): Operation("Creates an API key; only this answer has it.", "keys", _model_body(KeyTerms)),
    ("DELETE", "/keys/{name}"): Operation("Revokes an API key.", "keys"),
    ("POST", "/keys/{name}/rotate"): Operation("Gives an API key a new secret.", "keys"),
    ("GET", "/usage"): Operation(
        "What was used, in groups. A key with the role user sees itself only.",
        "usage",
        query={
            "group_by": f"Some of {', '.join(GROUPS)}.",
            **_BETWEEN,
            "key": "Only these keys, by name or id.",
            "model": "Only these models.",
        },
    ),
    ("GET", "/usage/energy"): Operation(
        "What the meters of the GPUs have counted, by what it was used for. A key with the role user sees itself only.",
        "usage",
        query={
            "group_by": f"Some of {', '.join(ENERGY_GROUPS)}.",
            **_BETWEEN,
            "node": "Only these nodes.",
            "model": "Only these models.",
            "key": "Only these keys, by name or id.",
            "kind": f"Only these of {', '.join(ENERGY_KINDS)}.",
        },
    ),
    ("GET", "/v1/organization/usage/completions"): _organization("The tokens of chats and completions."),
    ("GET", "/v1/organization/usage/embeddings"): _organization("The tokens of embeddings."),
    ("GET", "/v1/organization/costs"): _organization("What was used, in money."),
    ("GET", "/openapi.json"): Operation("This description.", "fleet"),
    ("GET", "/"): Operation(
        "The dashboard, for browsers; for other clients where everything is.",
        "dashboard",
        content_types=(*_PAGE, "application/json"),
    ),
    ("GET", "/dashboard/me"): Operation("Who is looking at the dashboard, and whether they may act.", "dashboard"),
    ("GET", "/dashboard/{path}"): Operation(
        "A file of the dashboard.", "dashboard", content_types=("text/javascript", "text/css", "image/svg+xml")
    ),
    ("GET", "/login"): Operation(
        "Sends a browser to the issuer (303).",
        "sign-in",
        query={"next": "The path to show after that."},
        content_types=_PAGE,
    ),
    ("GET", "/login/callback"): Operation(
        "The browser comes back from the issuer and gets the cookie of a session.",
        "sign-in",
        query={"code": "The issuer's.", "state": "As /login has sent it.", "error": "Why the issuer refuses."},
        content_types=_PAGE,
    ),
    ("GET", "/login/settings"): Operation("The issuer and the client that terminals sign in with.", "sign-in"),
    ("POST", "/logout"): Operation("Ends the browser's session.", "sign-in"),
}
"""By method and path; a test compares it with the routes."""


def openapi_document() -> dict[str, Any]:
    """The whole description. Pure."""
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        role = NEEDED_ROLES[method, path]
        described = operation.document(path)
        if role is None:
            described["security"] = []
        elif role != "user":
            described["description"] = f"Needs the role {role}."
        paths.setdefault(path, {})[method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "cortex", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": _SECURITY_SCHEMES},
        "security": [{name: []} for name in _SECURITY_SCHEMES],
    }


async def show_openapi(request: web.Request) -> web.Response:
    return web.json_response(openapi_document())
