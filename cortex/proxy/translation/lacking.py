"""Does an engine's 404 or 405 say that it lacks the path, or that it does not know the model? Pure."""

from __future__ import annotations

from cortex.proxy.translation.chat_stream import error_message
from cortex.proxy.translation.interface import engine_object


def lacks_path(status: int, body: bytes) -> bool:
    """True unless the body is a JSON error about the model. `status` is 404 or 405.

    An unknown path: vLLM and SGLang `{"detail": "Not Found"}`, llama.cpp "File Not Found", Ollama `404 page not found`,
    others HTML or nothing. An unknown model: vLLM "The model `x` does not exist", Ollama "model 'x' not found".
    """
    if status == 405:
        return True
    found = engine_object(body)
    if found is None:
        return True
    error = found.get("error")
    if isinstance(error, dict) and (error.get("param") == "model" or error.get("code") == "model_not_found"):
        return False
    return "model" not in error_message(found).lower()
