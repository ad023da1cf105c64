"""Which path means what: for engines, for cortex itself, misspelt, or unknown. Pure."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

from cortex.http.headers import forwarded_https
from cortex.http.request import Request
from cortex.proxy.body.json_scan import hides_names
from shared.errors import Forbidden, NotFound, shortened

INFERENCE_PATHS: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""POST routes whose body names a model, as vLLM has them. A POST to any other path that is not cortex's own goes to an
engine too if its body names a model."""
INFERENCE: Final = frozenset(path.encode() for path in INFERENCE_PATHS)
INFERENCE_TEXT: Final = {path.encode(): path for path in INFERENCE_PATHS}
"""The same as text: decoding it for each request would cost more than looking it up."""

MODELS: Final = b"/v1/models"
REALTIME: Final = b"/v1/realtime"
"""For WebSockets."""
OWN_PATHS: Final = (
    *(MODELS, b"/health", b"/fleet", b"/keys", b"/usage", b"/v1/organization", b"/openapi.json", b"/login", b"/logout"),
    b"/dashboard",
)
"""cortex answers these and everything below them itself."""
REGISTER: Final = b"/fleet/register"
"""Neurons show the registration token there, which is not an API key."""
START_PAGE: Final = b"/"
"""The dashboard, for browsers; for others a hint."""
METRICS: Final = b"/metrics"
"""Not here, but on `metrics_listen`."""
SIGN_IN_PAGES: Final = frozenset({START_PAGE, b"/login", b"/login/callback"})
"""A browser may come to these from the page of another site, the issuer's among them: they change nothing."""
_OPEN_PATHS: Final = SIGN_IN_PAGES | {b"/health", b"/openapi.json", b"/login/settings", b"/logout", REGISTER}
_DASHBOARD_BELOW: Final = b"/dashboard/"

_VLLM_MANAGEMENT: Final = """
abort_requests collective_rpc fault_tolerance finish_weight_update init_weight_transfer_engine
is_scaling_elastic_ep is_sleeping load_lora_adapter pause release_kv_cache_memory reset_encoder_cache
reset_mm_cache reset_prefix_cache resume scale_elastic_ep server_info shutdown_weight_transfer_engine
sleep start_draft_weight_update start_profile start_weight_update stop_profile unload_lora_adapter
update_weight_version update_weights wake_up weight_checker
"""
_SGLANG_AND_LLAMA_CPP_MANAGEMENT: Final = """
flush_cache freeze_gc load_lora_adapter_from_tensors lora-adapters pause_generation continue_generation
props release_memory_occupation resume_memory_occupation set_internal_state slots
update_weights_from_disk update_weights_from_distributed update_weights_from_tensor
"""
_MANAGES_ENGINE: Final = frozenset((_VLLM_MANAGEMENT + _SGLANG_AND_LLAMA_CPP_MANAGEMENT).split())
"""First segments, after a version, of routes that change an engine for all its users."""
_VERSION: Final = re.compile(r"v\d+")

RESPONSES: Final = b"/v1/responses"
_BELOW_RESPONSES: Final = RESPONSES + b"/"
NAMING_PATHS: Final = frozenset(
    (
        *INFERENCE_PATHS,
        REALTIME.decode(),
        *(f"/v1/responses/{{id}}{action}" for action in ("", "/cancel", "/input_items")),
    )
)
"""Paths, as `recorded_path` has them, that may name something: clients cannot make up others."""
_BACKGROUND: Final = re.compile(rb'(?<!\\)"background"\s*:\s*[^\s{\[fn]')
"""Neither false nor null: an engine may read `1` or `"true"` as true."""
_OWN_BELOW: Final = tuple(path + b"/" for path in OWN_PATHS)
_ONE_MODEL: Final = re.compile(rb"/*(?:v1/+)*models/+(.*[^/])/*")


def is_own(path: bytes) -> bool:
    """True for paths that cortex answers itself."""
    return path in OWN_PATHS or path.startswith(_OWN_BELOW)


def is_open(path: bytes) -> bool:
    """True for paths that need no key. The dashboard's files tell nothing about the fleet."""
    return path in _OPEN_PATHS or path.startswith(_DASHBOARD_BELOW)


def manages_engine(path: bytes) -> bool:
    """True for routes that manage an engine instead of using its model. They are not for clients: neuron uses them.

    `path` is compared as an engine's router may read it: percent-decoded, without empty and `.` segments.
    """
    segments = _segments_at_engine(path)
    return bool(segments) and segments[0].lower() in _MANAGES_ENGINE


def is_below_responses(path: bytes) -> bool:
    return path.startswith(_BELOW_RESPONSES)


def is_misspelt_response(path: bytes) -> bool:
    """True for a path that an engine's router may read as `/v1/responses` or one below it, and that cortex does not:
    it could not tell whose response that is."""
    segments = _segments_at_engine(path)
    if not segments or segments[0].lower() != "responses":
        return False
    return path.decode("latin-1") != "/".join(("/v1/responses", *segments[1:]))


def _segments_at_engine(path: bytes) -> list[str]:
    """Without a version."""
    segments = [segment for segment in unquote(path.decode("latin-1")).split("/") if segment not in ("", ".")]
    while segments and _VERSION.fullmatch(segments[0]):
        del segments[0]
    return segments


def is_for_web_pages(path: bytes) -> bool:
    """True for paths that pages of allowed origins may use: inference and the list of models, not the fleet."""
    return not is_own(path) or path == MODELS or path.startswith(MODELS + b"/")


def meant_path(path: bytes, *, reads: bool) -> bytes:
    """The known path that a slightly wrong one clearly means, otherwise `path` itself. `reads`: the method is GET or
    HEAD.

    Clients join base URL and path: a missing, doubled or trailing slash and a missing or doubled `/v1` come from a
    base URL with or without `/v1`. `path` is as received, without query.
    """
    one = _ONE_MODEL.fullmatch(path) if reads else None
    if one is not None:
        return path if path.startswith(MODELS + b"/") and not path.endswith(b"/") else b"%b/%b" % (MODELS, one[1])
    segments = [segment for segment in path.split(b"/") if segment]
    while segments[:2] == [b"v1", b"v1"]:
        del segments[0]
    plain = b"/" + b"/".join(segments)
    for known in (plain, b"/v1" + plain):
        if known in INFERENCE or known in (MODELS, REALTIME):
            return known
    return plain if is_own(plain) else path


def recorded_path(path: bytes) -> str:
    """The path as usage has it: without the id of a stored response, by which others could read that response, and
    without the end of a long one, which only its client knows."""
    text = INFERENCE_TEXT.get(path)
    if text is not None:
        return text
    if is_below_responses(path):
        _, slash, action = path[len(_BELOW_RESPONSES) :].partition(b"/")
        path = _BELOW_RESPONSES + b"{id}" + slash + action
    return shortened(path.decode("latin-1"))


def in_background(request: Request) -> bool:
    """True for a response, whose body is complete, that the engine makes after it has answered."""
    if request.path != RESPONSES:
        return False
    return _BACKGROUND.search(request.body) is not None or hides_names(request.body)


def has_wrong_base(path: bytes) -> bool:
    """True for a known path behind something else, such as `/api/v1/chat/completions`, and for the beginning of one:
    the client has the wrong base URL."""
    return path not in INFERENCE and (path.endswith(_BELOW_V1) or path.rstrip(b"/") in _BEGINNINGS)


_BELOW_V1: Final = tuple(path for path in INFERENCE if path.startswith(b"/v1/"))
_BEGINNINGS: Final = frozenset({b"", b"/v1", b"/chat", b"/v1/chat", b"/audio", b"/v1/audio"})

_STORED: Final = frozenset({"assistants", "batches", "conversations", "files", "threads", "vector_stores"})
"""Segments of paths to what the servers of OpenAI and Anthropic store."""


def not_for_clients(request: Request) -> Forbidden:
    path = shortened(request.raw_path.decode("latin-1"))
    return Forbidden(f"{path!r} manages an engine; use cortex's /fleet routes instead")


def no_route(request: Request) -> NotFound:
    """The error for an unknown path. It gives the base URLs, with https if a proxy in front says so."""
    if request.path == METRICS:
        return NotFound(
            "no metrics here: cortex serves them at /metrics of the address in [gateway] metrics_listen of cortex.toml,"
            " by default http://127.0.0.1:31314/metrics on its host"
        )
    scheme = "https" if forwarded_https(request.passed_value(b"x-forwarded-proto") or b"") else "http"
    base = f"{scheme}://{shortened((request.host or b'HOST').decode('latin-1'))}"
    method, path = request.method.decode("latin-1"), shortened(request.raw_path.decode("latin-1"))
    segments = request.path.decode("latin-1").split("/")
    stored = next((segment for segment in segments if segment in _STORED), None)
    hint = "" if stored is None else f"cortex has no {stored}, so send each request by itself; "
    return NotFound(
        f"no route for {method} {path!r}: {hint}the base URL is {base}/v1 for OpenAI's clients and {base} for "
        "Anthropic's. A POST to any other path must name a model in its body"
    )
