"""The requests that every Python library makes, and the report that the test reads.

Started as `python -m tests.clients.scripts.NAME BASE_URL MODEL MODEL`; neither model is loaded.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

BASE_URL = sys.argv[1]
QUESTION = "Who are you?"
WEATHER_QUESTION = "What is the weather in Paris?"
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL = {"type": "function", "function": WEATHER}


def report(
    *,
    stream: Callable[[str], Iterable[str]] | None = None,
    plain: Callable[[str], str | None] | None = None,
    tool_stream: Callable[[str], tuple[str, Any]] | None = None,
    tool_plain: Callable[[str], tuple[str, Any]] | None = None,
    **others: Callable[[str], Any],
) -> None:
    """Calls each with a model, first with both models cold, and prints the results as JSON.

    `stream` gives the pieces of the answer to QUESTION, `plain` the whole answer, the tool functions the name and the
    arguments of the call that WEATHER_QUESTION leads to.
    """
    first, second = sys.argv[2:4]
    results: dict[str, Any] = {}

    def record(case: str, function: Callable[[str], Any] | None, model: str) -> None:
        if function is None:
            return
        try:
            result = function(model)
            results[case] = result if result is None or isinstance(result, str) else list(result)
        except Exception:  # noqa: BLE001 - one broken case must not hide the others
            results[case] = {"error": traceback.format_exc()}

    record("cold_stream", stream, first)
    record("cold_plain", plain, second)
    record("warm_stream", stream, first)
    record("warm_plain", plain, second)
    record("tool_stream", tool_stream, first)
    record("tool_plain", tool_plain, first)
    for name, function in others.items():
        record(name, function, first)
    print(json.dumps(results))
