"""The `input` of a request as the messages of a chat. Pure.

Chat templates are strict: many allow one system message, at the start, and demand that user and assistant alternate. So
instructions and leading developer messages become one system message, and consecutive items of one role one message.
"""

from __future__ import annotations

import json
from typing import Any, Final

from cortex.proxy.translation.fields import invalid, is_set, objects_of, text_of
from cortex.proxy.translation.interface import Json
from cortex.proxy.translation.responses.tools import ToolSet, custom_arguments

_ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_DROPPED: Final = ("web_search_call",)
"""Items that record what OpenAI's servers did; the answers that follow say what came of it."""

_DETAILS: Final = ("auto", "low", "high")


def messages_of(instructions: Any, given: Any, tools: ToolSet) -> list[Json]:
    """The messages for `instructions` and `input`. Tools that the input declares are added to `tools`.

    Raises:
        InvalidRequest: malformed, or an item that needs a server with a memory.
    """
    conversation = _Conversation(tools)
    if instructions is not None:
        if not isinstance(instructions, str):
            raise invalid("instructions", "must be a string")
        conversation.say("system", [_text(instructions)])
    if isinstance(given, str):
        conversation.say("user", [_text(given)])
    else:
        if not given:
            raise invalid("input", "required (a string or a list of items)")
        for index, item in enumerate(objects_of(given, "input")):
            conversation.add(item, f"input[{index}]")
    return conversation.finished()


class _Conversation:
    """The messages so far. The content of each is a list of parts until the end."""

    def __init__(self, tools: ToolSet) -> None:
        self._tools = tools
        self._messages: list[Json] = []
        self._pictures: list[Json] = []  # returned by tools; they follow the results as a user's message

    def add(self, item: Json, param: str) -> None:
        kind = item.get("type", "message")
        if kind in ("function_call_output", "custom_tool_call_output"):
            self._add_output(item, param)
            return
        self._show_pictures()
        if kind == "message":
            self._add_message(item, param)
        elif kind == "function_call":
            name = self._tools.function_name(text_of(item, "name", param), item.get("namespace"))
            self._add_call(item, name, _arguments(text_of(item, "arguments", param)), param)
        elif kind == "custom_tool_call":
            name = self._tools.function_name(text_of(item, "name", param), item.get("namespace"))
            self._add_call(item, name, custom_arguments(text_of(item, "input", param)), param)
        elif kind == "reasoning":
            self._add_reasoning(item, param)
        elif kind == "additional_tools":
            self._tools.add(item.get("tools"), f"{param}.tools")
        elif kind == "item_reference":
            raise invalid(param, "the engine stores no items; send the item itself")
        elif kind not in _DROPPED:
            raise invalid(
                f"{param}.type", f"an item of type {json.dumps(kind)} has no equivalent in a chat; leave it out"
            )

    def say(self, role: str, parts: list[Json]) -> None:
        """Appends to the last message, if it has this role."""
        self._last(role)["content"].extend(parts)

    def finished(self) -> list[Json]:
        self._show_pictures()
        messages = [m for m in self._messages if m["content"] or m.get("tool_calls")]
        if not messages:
            raise invalid("input", "has no content")
        for message in messages:
            message["content"] = _content(message["role"], message["content"])
            if "reasoning_content" in message:
                message["reasoning_content"] = "\n".join(message["reasoning_content"])
        return messages

    def _last(self, role: str) -> Json:
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]

    def _add_message(self, item: Json, param: str) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid(f"{param}.role", f"must be one of {', '.join(_ROLES)}, got {json.dumps(role)}")
        parts = _parts(item.get("content"), f"{param}.content")
        if _ROLES[role] == "system" and self._messages and self._messages[-1]["role"] != "system":
            # Many templates refuse a system message here.
            texts = "\n".join(part["text"] for part in parts if part["type"] == "text")
            self.say("user", [_text(f"<system>\n{texts}\n</system>"), *(p for p in parts if p["type"] != "text")])
        else:
            self.say(_ROLES[role], parts)

    def _add_call(self, item: Json, name: str, arguments: str, param: str) -> None:
        call = {
            "id": text_of(item, "call_id", param),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self._last("assistant").setdefault("tool_calls", []).append(call)

    def _add_reasoning(self, item: Json, param: str) -> None:
        """Only the model's own words: a summary is not what it thought, and encrypted content is unreadable here."""
        parts = objects_of(item.get("content"), f"{param}.content")
        said = "\n".join(text_of(part, "text", f"{param}.content[{index}]") for index, part in enumerate(parts))
        if said:
            self._last("assistant").setdefault("reasoning_content", []).append(said)

    def _add_output(self, item: Json, param: str) -> None:
        call_id, output = text_of(item, "call_id", param), item.get("output")
        parts = _parts(output, f"{param}.output")
        texts = [part["text"] for part in parts if part["type"] == "text"]
        pictures = [part for part in parts if part["type"] != "text"]
        if pictures:
            self._pictures += [_text(f"Returned by the tool call {call_id}:"), *pictures]
            texts = texts or ["(The result follows in the next message.)"]
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": [_text("\n".join(texts))]})

    def _show_pictures(self) -> None:
        """Few engines accept pictures in a tool's result."""
        if self._pictures:
            self.say("user", self._pictures)
            self._pictures = []


def _arguments(text: str) -> str:
    """A call's arguments, made an object if they are none: chat templates fail at anything else, so that a model's slip
    would make the rest of the conversation impossible."""
    try:
        readable = isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        readable = False
    return (text or "{}") if readable else custom_arguments(text)


def _parts(content: Any, param: str) -> list[Json]:
    """The parts of a chat's message for the content of an item: a string or a list."""
    if isinstance(content, str):
        return [_text(content)]
    if content is None:
        raise invalid(param, "required (a string or a list of parts)")
    return [_part(part, f"{param}[{index}]") for index, part in enumerate(objects_of(content, param))]


def _part(part: Json, param: str) -> Json:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text", "reasoning_text", "summary_text"):
        return _text(text_of(part, "text", param))
    if kind == "refusal":
        return _text(text_of(part, "refusal", param))
    if kind == "input_image":
        return _image(part, param)
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    if kind == "input_file":
        return _file(part, param)
    raise invalid(f"{param}.type", f"content of type {json.dumps(kind)} has no equivalent in a chat")


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _image(part: Json, param: str) -> Json:
    if is_set(part, "file_id"):
        raise invalid(f"{param}.file_id", "the engine stores no files; send the image as a data URL in `image_url`")
    image: Json = {"url": text_of(part, "image_url", param)}
    if part.get("detail") in _DETAILS:
        image["detail"] = part["detail"]
    return {"type": "image_url", "image_url": image}


def _file(part: Json, param: str) -> Json:
    for key in ("file_id", "file_url"):
        if is_set(part, key):
            raise invalid(f"{param}.{key}", "the engine stores and fetches no files; send the content in `file_data`")
    given = {key: part[key] for key in ("filename", "file_data") if is_set(part, key)}
    return {"type": "file", "file": given}


def _content(role: str, parts: list[Json]) -> Any:
    """Plain text where possible: some engines accept nothing else."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if role in ("system", "assistant") and len(texts) == len(parts):
        return "\n\n".join(texts)
    return texts[0] if len(parts) == 1 and texts else parts
