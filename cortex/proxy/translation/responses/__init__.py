"""OpenAI's Responses API on an engine that has only chat completions. `translation.py` is the entry, `request.py` the
way there, `response.py` and `stream.py` the way back."""
