"""The libraries of OpenAI and Anthropic with a key whose budget lasts for a few requests: the error that ends them.

Started as `python -m tests.clients.scripts.used_budget BASE_URL MODEL`, with the key in the environment variable KEY.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import anthropic
import openai

URL, MODEL = sys.argv[1:3]
REQUEST: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}]}


def until_refused(ask: Any) -> str:
    try:
        while True:
            ask(**REQUEST)
    except (openai.RateLimitError, anthropic.RateLimitError) as refused:
        return f"{refused.response.headers['retry-after']} {refused}"


if __name__ == "__main__":
    key = os.environ["KEY"]
    by_library = {
        "openai": openai.OpenAI(base_url=f"{URL}/v1", api_key=key).chat.completions.create,
        "anthropic": anthropic.Anthropic(base_url=URL, api_key=key).messages.create,
    }
    print(json.dumps({library: until_refused(ask) for library, ask in by_library.items()}))
