"""Which parsers of vLLM a model family needs so that clients can offer it tools. Pure.

Parser names as vLLM 0.32 registers them; a test compares them with an installed vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from neuron.harness.vllm.argument_policy import has_flag
from shared.errors import InvalidRequest

AUTO: Final = "--enable-auto-tool-choice"
TOOL_PARSER: Final = "--tool-call-parser"
REASONING_PARSER: Final = "--reasoning-parser"


@dataclass(frozen=True)
class Family:
    """Models whose name matches `pattern`. `reasoning` None: they do not think, or not in a form that needs a parser.
    `tool` None: no parser of vLLM reads their calls."""

    pattern: str
    tool: str | None
    reasoning: str | None = None


FAMILIES: Final = (
    # Fine-tunes and distillations have the name of their base in theirs, so they come first.
    Family(r"deepseek-r1-distill|llama.*nemotron", None),
    Family(r"embedding|embed|rerank|reward|-asr|-tts", None),
    Family(r"xlam", "xlam"),
    Family(r"hermes-?[234]", "hermes"),
    Family(r"nemotron-?3", "qwen3_coder", "nemotron_v3"),
    Family(r"qwen3-?coder", "qwen3_coder"),
    Family(r"qwen3\.\d", "qwen3_coder", "qwen3"),
    Family(r"qwen3.*instruct", "hermes"),
    Family(r"qwen3", "hermes", "qwen3"),
    Family(r"qwq", "hermes", "deepseek_r1"),
    Family(r"qwen2", "hermes"),
    Family(r"gpt-?oss", "openai", "openai_gptoss"),
    Family(r"deepseek-v4\.1", "deepseek_v41", "deepseek_v41"),
    Family(r"deepseek-v4", "deepseek_v4", "deepseek_v4"),
    Family(r"deepseek-v3\.2", "deepseek_v32", "deepseek_v3"),
    Family(r"deepseek-v3\.1", "deepseek_v31", "deepseek_v3"),
    Family(r"deepseek-r1", "deepseek_v3", "deepseek_r1"),
    Family(r"deepseek-v3", "deepseek_v3"),
    Family(r"glm-?4\.[56]", "glm45", "glm45"),
    Family(r"glm-?(?:4\.7|5)", "glm47", "glm47"),
    Family(r"kimi-?k3", "kimi_k3", "kimi_k3"),
    Family(r"kimi-?k2.*instruct", "kimi_k2"),
    Family(r"kimi-?k2", "kimi_k2", "kimi_k2"),
    Family(r"minimax-?m3", "minimax_m3", "minimax_m3"),
    Family(r"minimax-?m2", "minimax_m2", "minimax_m2"),
    Family(r"magistral|mi(?:ni)?stral.*reasoning", "mistral", "mistral"),
    Family(r"(?:mi(?:ni)?|dev)stral", "mistral"),
    Family(r"llama-?4", "llama4_pythonic"),
    Family(r"llama-?3\.[123]", "llama3_json"),
    Family(r"functiongemma", "functiongemma"),
    Family(r"gemma-?4", "gemma4", "gemma4"),
    Family(r"granite-?20b", "granite-20b-fc"),
    Family(r"granite-?4", "granite4"),
    Family(r"granite-?3", "granite"),
    Family(r"phi-?4-mini", "phi4_mini_json"),
    Family(r"olmo-?3.*think", "olmo3", "olmo3"),
    Family(r"olmo-?3", "olmo3"),
    Family(r"seed-?oss", "seed_oss", "seed_oss"),
    Family(r"step-?3\.5", "step3p5", "step3p5"),
    Family(r"step-?3", "step3", "step3"),
    Family(r"hunyuan-?a13b", "hunyuan_a13b", "hunyuan_a13b"),
    Family(r"ernie-?4\.5.*thinking", "ernie45", "ernie45"),
    Family(r"mimo-?v2", "mimo", "mimo"),
    Family(r"longcat", "longcat"),
    Family(r"internlm-?[23]", "internlm"),
    Family(r"jamba", "jamba"),
    Family(r"lfm-?2", "lfm2"),
    Family(r"apertus", "apertus"),
    Family(r"gigachat-?3", "gigachat3"),
)
"""The first match decides."""


def tool_arguments(names: Sequence[str], args: Sequence[str]) -> tuple[str, ...]:
    """The flags for a model that has these names (paths or hub names, the most telling first) and arguments. Parsers
    that the arguments already choose are kept.

    Raises:
        InvalidRequest: no family matches, so the arguments have to choose a parser.
    """
    switch = () if has_flag(args, AUTO) else (AUTO,)
    if has_flag(args, TOOL_PARSER):
        return switch
    family = family_of(names)
    if family is None or family.tool is None:
        raise InvalidRequest(
            f"tools: no tool-call parser known for {names[0]!r}; if vLLM has one, put {AUTO} {TOOL_PARSER} NAME into "
            "args, otherwise set tools = false",
            param="tools",
        )
    thinking = family.reasoning is not None and not has_flag(args, REASONING_PARSER)
    reasoning = (REASONING_PARSER, family.reasoning) if thinking and family.reasoning is not None else ()
    return (*switch, TOOL_PARSER, family.tool, *reasoning)


def family_of(names: Sequence[str]) -> Family | None:
    """The family of a model with these names; None when none matches."""
    return next((family for name in _last_parts(names) for family in FAMILIES if re.search(family.pattern, name)), None)


def _last_parts(names: Sequence[str]) -> Iterator[str]:
    """What follows the organisation or the directory, in lower case and with dashes."""
    for name in names:
        yield name.rstrip("/").rpartition("/")[2].lower().replace("_", "-").replace(" ", "-")
