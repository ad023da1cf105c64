"""What a simulated model answers: made-up text, JSON for a schema, or a tool call. Pure."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron.sim.engine import tokens
from neuron.sim.engine.schema import instance

_QUOTED_CHARACTERS = 200
_FILLER = (
    " Every word of this answer is made up, and the same question gets the same words again."
    " No weights were read to write it."
    " It ends by itself, as a model's answer does, unless max_tokens cuts it short."
)
_FEW_TOOLS = 4  # a client that offers so few wants one called; a coding agent offers dozens with every message
_COMMON_WORDS = frozenset({"get", "set", "tool", "the", "and", "for", "use", "new", "all", "user", "file"})
_QUOTATION = re.compile(r"[\"“'`]([^\"”'`]+)[\"”'`]")


@dataclass(frozen=True)
class Prompt:
    """One prompt: the whole text, and the part that the answer quotes. `after_tool`: it ends with the result of a tool
    call."""

    text: str
    quoted: str
    after_tool: bool = False

    @property
    def token_count(self) -> int:
        return tokens.count(self.text)


@dataclass(frozen=True)
class Tool:
    """A function that the client offers; `parameters` is a JSON schema."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """A given answer. `tool`: it is the arguments of a call of this tool. `named`: the client named it."""

    text: str
    tool: str | None = None
    named: bool = False


def made_up(model: str, prompt: Prompt, choice: int) -> tuple[list[str], Iterator[str]]:
    """The answer without a `Reply`: its tokens (the model's name, a quote of the prompt, a sentence or two), and an
    endless continuation."""
    which = f" answer {choice + 1}" if choice else ""
    opening = f'{model} (simulated){which}: "{prompt.quoted[:_QUOTED_CHARACTERS]}"'
    filler = tokens.pieces(_FILLER)
    return [*tokens.pieces(opening), *filler], itertools.cycle(filler)


def json_reply(schema: object, prompt: Prompt) -> Reply:
    """A JSON document that satisfies `schema`, with every property filled."""
    return Reply(json.dumps(instance(schema, _subject(prompt.quoted), optional=True), ensure_ascii=False))


def call_of(tool: Tool, prompt: Prompt, *, named: bool = False) -> Reply:
    """A call of `tool`; its string arguments repeat words of the prompt."""
    arguments = instance(tool.parameters, _subject(prompt.quoted))
    return Reply(json.dumps(arguments, ensure_ascii=False), tool.name, named=named)


def chosen_tool(tools: Sequence[Tool], prompt: Prompt) -> Tool | None:
    """The tool that a model would call by itself: the one whose name shares most words with the prompt, else the first
    of a few. None after a tool's result, so that agents come to an end."""
    if prompt.after_tool or not tools:
        return None
    said = set(_words(prompt.quoted))
    shared = [len(said & (set(_words(tool.name)) - _COMMON_WORDS)) for tool in tools]
    if max(shared):
        return tools[shared.index(max(shared))]
    return tools[0] if len(tools) <= _FEW_TOOLS else None


def _words(text: str) -> list[str]:
    """Lower-case words; `getWeather` and `get_weather` have two."""
    return re.findall(r"[a-z]{3,}", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())


def _subject(text: str) -> str:
    """What a text is about, roughly: a quotation, a path, the last name or number in it, or its last word."""
    quotation = _QUOTATION.search(text)
    if quotation is not None:
        return quotation[1]
    words = [word for word in (word.strip("?!.,:;()[]{}<>\"'") for word in text.split()) if word]
    telling = [word for word in words if re.search(r"\w[/.]\w", word)]
    telling = telling or [word for word in words[1:] if word[0].isupper() or word[0].isdigit()]
    return (telling or words or ["simulated"])[-1][:_QUOTED_CHARACTERS]
