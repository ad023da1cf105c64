"""Tools of a request as functions of a chat, and the model's calls back to the tools they stand for. Pure.

A chat has functions only. The functions of a namespace get its name before theirs; a custom tool, whose input is free
text, becomes a function with one string. `web_search` beside other tools is left out, because the model need not search
and Codex always offers it. Other tools that OpenAI's servers would run are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from cortex.proxy.translation.fields import invalid, object_of, objects_of, text_of
from cortex.proxy.translation.interface import Json

INPUT: Final = "input"
"""The argument of the function that stands for a custom tool."""

_SEPARATOR: Final = "__"
_WEB_SEARCH: Final = "web_search"
_OF_FUNCTIONS: Final = ("name", "description", "parameters", "strict")
_CLIENT_SIDE: Final = ("local_shell", "shell", "apply_patch")


@dataclass(frozen=True)
class CalledTool:
    """The tool that a function stands for."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass
class ToolSet:
    """The tools of one request. `functions`: by name, as a chat's `tools` has them. `kept`: the client's own
    definitions of those that are in use."""

    functions: dict[str, Json] = field(default_factory=dict)
    kept: list[Json] = field(default_factory=list)
    _called: dict[str, CalledTool] = field(default_factory=dict)
    _without_namespace: dict[str, list[str]] = field(default_factory=dict)  # functions by their tool's name
    _left_out: list[str] = field(default_factory=list)

    def add(self, tools: Any, param: str) -> None:
        """Adds definitions.

        Raises:
            InvalidRequest: malformed, or a tool that only OpenAI's servers can run.
        """
        for index, tool in enumerate(objects_of(tools, param)):
            self._add(tool, f"{param}[{index}]", None)

    def check(self) -> None:
        """Raises InvalidRequest if only tools are offered that had to be left out: the client relies on them."""
        if self._left_out and not self.functions:
            param = self._left_out[0]
            raise invalid(param, "the engine cannot search the web; remove the tool, or offer a function that searches")

    def called(self, function: str) -> CalledTool:
        """The tool that a called function stands for. A model may also name a function that does not exist."""
        name = self._find(function, None)
        return self._called[name] if name is not None else CalledTool(function)

    def function_name(self, name: str, namespace: Any) -> str:
        """The function that stands for a tool, whether it is still offered or not."""
        return f"{namespace}{_SEPARATOR}{name}" if isinstance(namespace, str) and namespace else name

    def choice(self, given: Any) -> Any:
        """A request's `tool_choice` as a chat has it, None to leave it out; forgets functions that it rules out.

        Raises:
            InvalidRequest: it names a tool that is not offered, or requires one where there is none.
        """
        if isinstance(given, dict) and given.get("type") == "allowed_tools":
            self._allow(given)
            given = given.get("mode", "auto")
        if isinstance(given, dict):
            name = self._named(given, "tool_choice")
            return {"type": "function", "function": {"name": name}}
        if given not in (None, "auto", "none", "required"):
            raise invalid("tool_choice", f"must be auto, none, required or a tool, got {json.dumps(given)}")
        if not self.functions:
            if given == "required":
                raise invalid("tool_choice", "required needs at least one tool in `tools`")
            return None
        return given

    def _add(self, tool: Json, param: str, namespace: str | None) -> None:
        kind = tool.get("type")
        if kind == "function":
            self._add_function(
                tool, {key: tool[key] for key in _OF_FUNCTIONS if tool.get(key) is not None}, param, namespace
            )
        elif kind == "custom":
            self._add_function(tool, _custom_function(tool, param), param, namespace, custom=True)
        elif kind == "namespace" and namespace is None:
            self._add_namespace(tool, param)
            return
        elif isinstance(kind, str) and kind.startswith(_WEB_SEARCH):
            self._left_out.append(param)
            return
        elif kind in _CLIENT_SIDE:
            raise invalid(
                f"{param}.type", f"{kind!r} has no equivalent in a chat; offer a tool of type 'function' instead"
            )
        else:
            reason = f"the engine runs no tools of type {json.dumps(kind)}; offer tools of type 'function' instead"
            raise invalid(f"{param}.type", reason)
        if namespace is None:
            self.kept.append(tool)

    def _add_function(
        self, tool: Json, function: Json, param: str, namespace: str | None, *, custom: bool = False
    ) -> None:
        name = text_of(tool, "name", param)
        flat = self.function_name(name, namespace)
        self.functions[flat] = {"type": "function", "function": {**function, "name": flat}}
        if flat not in self._called:
            self._without_namespace.setdefault(name, []).append(flat)
        self._called[flat] = CalledTool(name, namespace, custom)

    def _add_namespace(self, tool: Json, param: str) -> None:
        name = text_of(tool, "name", param)
        for index, inner in enumerate(objects_of(tool.get("tools"), f"{param}.tools")):
            self._add(inner, f"{param}.tools[{index}]", name)
        self.kept.append(tool)

    def _find(self, name: str, namespace: Any) -> str | None:
        """The function for a tool, also for a namespace's tool without the namespace if there is only one."""
        flat = self.function_name(name, namespace)
        if flat in self._called:
            return flat
        if namespace:
            return None
        found = self._without_namespace.get(name, [])
        return found[0] if len(found) == 1 else None

    def _named(self, given: Json, param: str) -> str:
        if given.get("type") not in ("function", "custom"):
            raise invalid(f"{param}.type", f"the engine runs no tools of type {json.dumps(given.get('type'))}")
        name = text_of(given, "name", param)
        found = self._find(name, given.get("namespace"))
        if found is None:
            raise invalid(f"{param}.name", f"no tool {name!r} in `tools`")
        return found

    def _allow(self, given: Json) -> None:
        allowed = objects_of(given.get("tools"), "tool_choice.tools")
        names = {self._named(tool, f"tool_choice.tools[{index}]") for index, tool in enumerate(allowed)}
        self.functions = {name: function for name, function in self.functions.items() if name in names}


def _custom_function(tool: Json, param: str) -> Json:
    """A custom tool as a function. A grammar is only told to the model: nothing enforces it."""
    description = tool.get("description")
    lines = [description] if isinstance(description, str) and description else []
    given = object_of(tool.get("format"), f"{param}.format")
    if given.get("type") == "grammar":
        lines.append(f"`{INPUT}` must match this {given.get('syntax')} grammar:\n{given.get('definition')}")
    schema = {
        "type": "object",
        "properties": {INPUT: {"type": "string"}},
        "required": [INPUT],
        "additionalProperties": False,
    }
    lines.append(f"Put the whole input, as plain text, into the argument `{INPUT}`.")
    return {"description": "\n\n".join(lines), "parameters": schema}


def custom_arguments(text: str) -> str:
    """The arguments of the function that stands for a custom tool, for its input."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """A custom tool's input, from the complete arguments of its function. Text that is not JSON is the input itself."""
    try:
        given = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    value = given.get(INPUT) if isinstance(given, dict) else None
    return value if isinstance(value, str) else arguments


_OPENING: Final = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
# Complete characters only: an escape, or the second half of a pair, may not have arrived yet.
_COMPLETE: Final = re.compile(r'(?:[^"\\]|\\(?:["\\/bfnrt]|u[dD][89abAB]..\\u....|u(?![dD][89abAB])[0-9a-fA-F]{4}))+')


class CustomInput:
    """Decodes a custom tool's input while the arguments of its function arrive in pieces. `text`: the input so far."""

    def __init__(self) -> None:
        self.text = ""
        self._opened = False
        self._rest = ""  # of the arguments, not decoded yet

    def add(self, piece: str) -> str:
        """What `piece` adds to the input, "" as long as that is unknown."""
        self._rest += piece
        if not self._opened:
            opening = _OPENING.match(self._rest)
            if opening is None:
                return ""
            self._opened = True
            self._rest = self._rest[opening.end() :]
        complete = _COMPLETE.match(self._rest)
        if complete is None:
            return ""
        self._rest = self._rest[complete.end() :]
        added: str = json.loads(f'"{complete[0]}"', strict=False)
        self.text += added
        return added

    def finish(self, arguments: str) -> str:
        """What the complete arguments add to the input."""
        whole = custom_input(arguments)
        if not whole.startswith(self.text) or (self._opened and whole == arguments):
            return ""  # the arguments were cut off: the input ends where they do
        added = whole[len(self.text) :]
        self.text = whole
        return added
