"""The longest sequence of a model, as vLLM derives it (`_get_and_verify_max_len` of 0.32). Pure."""

from __future__ import annotations

from collections.abc import Iterator

from neuron.estimate.files.fields import Fields

UNKNOWN = 2048  # what vLLM assumes without any of the keys
_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# max_position_embeddings already includes these kinds of scaling.
_INCLUDED = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})


def longest(text: Fields) -> int:
    """The maximum number of tokens in a sequence."""
    given = [value for value in (text.integer(key) for key in _KEYS) if value]
    base = text.integer("model_max_length") or min(given, default=UNKNOWN)
    if "gemma3" in (text.text("model_type") or ""):
        return base
    factor = 1.0
    for rope in _ropes(text):
        if _kind(rope) not in _INCLUDED:
            factor = rope.number("factor") or factor
    return max(1, int(base * factor))


def default_length(text: Fields) -> int:
    """vLLM's default `--max-model-len`: `longest`, except that LongRoPE counts without the scaling."""
    if any(_kind(rope) == "longrope" for rope in _ropes(text)):
        return text.integer("original_max_position_embeddings") or longest(text)
    return longest(text)


def _ropes(text: Fields) -> Iterator[Fields]:
    """The rotary embedding's parameters: one set, or one per layer type."""
    found = text.inner("rope_parameters", "rope_scaling")
    if found is None:
        return
    if any(isinstance(value, dict) for value in found.values.values()):
        for name, value in found.values.items():
            if isinstance(value, dict):
                yield Fields(value, f"{found.file}: {name}")
    else:
        yield found


def _kind(rope: Fields) -> str:
    return rope.text("rope_type", "type") or "default"
