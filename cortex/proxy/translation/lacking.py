"""Does an engine's answer say that it lacks the path, or that it does not know the model? Pure."""

from __future__ import annotations

import re
from typing import Final

from cortex.proxy.translation.chat_stream import error_message
from cortex.proxy.translation.interface import CHAT_PATH, engine_object

# "models" does not match: an engine without the path may list those that it has.
_OBJECT: Final = r"\b(?:model|adapter|response|conversation|prompt)\b"
_UNKNOWN_OBJECT: Final = re.compile(
    rf"{_OBJECT}.{{0,400}}\b(?:not|unknown|unavailable|missing|invalid)\b"
    rf"|\b(?:not|no|unknown|invalid|find)\b.{{0,60}}{_OBJECT}",
    re.IGNORECASE | re.DOTALL,
)

_UNKNOWN_PATH: Final = "Unexpected endpoint"


def lacks_chats(engine: str, path: str) -> str:
    """What to tell the client of an engine that has neither `path` nor chat completions."""
    return f"{engine} has neither {path} nor {CHAT_PATH.decode()}: this model does not answer such requests"


def lacks_path(status: int, body: bytes) -> bool:
    """True unless the body is a JSON error about the model or another thing that the request names. `status` is 404,
    405, or 200, with which LM Studio answers any path: `{"error": "Unexpected endpoint or method. (POST
    /v1/messages)"}`.

    An unknown path: vLLM and SGLang `{"detail": "Not Found"}`, llama.cpp "File Not Found", Ollama `404 page not found`,
    others HTML or nothing. An unknown model: vLLM "The model `x` does not exist", Ollama "model 'x' not found". An
    unknown earlier response: vLLM "Response with id 'x' not found", with `param`. In doubt the path is missing: the
    engine's answer to the translated request then says what is wrong.
    """
    if status == 405:
        return True
    found = engine_object(body)
    if status == 200:
        said = None if found is None else found.get("error")
        return isinstance(said, str) and said.startswith(_UNKNOWN_PATH)
    if found is None:
        return True
    error = found.get("error")
    if isinstance(error, dict) and (error.get("param") or error.get("code") == "model_not_found"):
        return False
    return _UNKNOWN_OBJECT.search(error_message(found)) is None
