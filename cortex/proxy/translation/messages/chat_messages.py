"""The conversation of Anthropic's Messages API as messages of a chat. Pure."""

from __future__ import annotations

from typing import Any, Final

from cortex.proxy.translation.fields import invalid, object_of, text_of
from cortex.proxy.translation.interface import Json, to_json

_BILLING: Final = "x-anthropic-billing-header"
"""Begins a block that Claude Code puts before its system prompt. It differs in each request, so with it no prompt would
be found in the engine's prefix cache."""


def chat_messages(given: Json, engine: str) -> list[Json]:
    """`system` and `messages` of a request; `engine` names the engine in errors. A system message that is not at the
    beginning becomes a part of the user's, in a tag: many templates refuse it there.

    Raises:
        InvalidRequest: malformed, or with content that a chat cannot carry.
    """
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list of at least one message")
    chat: list[Json] = []  # content and reasoning_content are lists until the end
    system = _system_parts(given.get("system"), "system")
    if system:
        chat.append({"role": "system", "content": system})
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict):
            raise invalid(param, "must be an object")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise invalid(f"{param}.role", f"must be user or assistant, got {role!r}")
        if content is None:
            raise invalid(f"{param}.content", "required (a string or a list of content blocks)")
        if role == "user":
            for part in _user_messages(content, f"{param}.content", engine):
                _add(chat, part)
        elif role == "assistant":
            _add(chat, _assistant_message(content, f"{param}.content", engine))
        else:
            parts = _system_parts(content, f"{param}.content")
            if chat and chat[-1]["role"] != "system":
                _add(chat, {"role": "user", "content": [_text(f"<system>\n{_joined(parts)}\n</system>")]})
            else:
                _add(chat, {"role": "system", "content": parts})
    return [_finished(message) for message in chat]


def _add(chat: list[Json], message: Json) -> None:
    """Adds a message, or to the last one of the same role: many templates want roles to alternate."""
    last = chat[-1] if chat else None
    if last is None or last["role"] != message["role"] or message["role"] == "tool":
        chat.append(message)
    else:
        for key in ("content", "reasoning_content", "tool_calls"):
            if key in message:
                last.setdefault(key, []).extend(message[key])


def _finished(message: Json) -> Json:
    """The message as an engine gets it."""
    role, content = message["role"], message["content"]
    if role == "system":
        message["content"] = _joined(content)
    elif role == "user":
        message["content"] = _content(content)
    elif role == "assistant":
        text = "".join(part["text"] for part in content)
        message["content"] = text or (None if "tool_calls" in message else "")
        if "reasoning_content" in message:
            message["reasoning_content"] = "".join(message["reasoning_content"])
    return message


def _joined(parts: list[Json]) -> str:
    return "\n".join(part["text"] for part in parts)


def _blocks_of(content: Any, param: str) -> list[Json]:
    """Content as a list of blocks; a string is one block of text, null is none."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise invalid(param, "must be a string or a list of content blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise invalid(f"{param}[{index}]", "must be a content block")
    return content


def _system_parts(content: Any, param: str) -> list[Json]:
    parts = []
    for index, block in enumerate(_blocks_of(content, param)):
        if block.get("type") != "text":
            raise invalid(f"{param}[{index}]", "a system prompt can contain text only")
        text = text_of(block, "text", f"{param}[{index}]")
        if not text.startswith(_BILLING):
            parts.append(_text(text))
    return parts


def _user_messages(content: Any, param: str, engine: str) -> list[Json]:
    """The results of tools, which must directly follow their calls, then one message with everything else."""
    results: list[Json] = []
    parts: list[Json] = []
    for index, block in enumerate(_blocks_of(content, param)):
        where = f"{param}[{index}]"
        if block.get("type") == "tool_result":
            result, images = _tool_message(block, where, engine)
            results.append(result)
            parts += images
        else:
            parts += _parts(block, where, engine)
    if parts or not results:
        return [*results, {"role": "user", "content": parts}]
    return results


def _tool_message(block: Json, param: str, engine: str) -> tuple[Json, list[Json]]:
    """The message with a tool's result, and parts for the user's message: only that can carry images."""
    called = _engine_id(block, "tool_use_id", param)
    parts: list[Json] = []
    for index, inner in enumerate(_blocks_of(block.get("content"), f"{param}.content")):
        parts += _parts(inner, f"{param}.content[{index}]", engine)
    images = [part for part in parts if part["type"] != "text"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if images:
        texts.append(f"({len(images)} images of this result are in the next message)")
        images.insert(0, _text(f"Images of the result of {called}:"))
    text = "\n".join(texts)
    if block.get("is_error") is True:
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": called, "content": text}, images


def _parts(block: Json, param: str, engine: str) -> list[Json]:
    """A block of a user's message, or of a tool's result, as parts of a chat message."""
    kind = block.get("type")
    if kind == "text":
        return [_text(text_of(block, "text", param))]
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _image_url(block.get("source"), f"{param}.source", engine)}}]
    if kind == "document":
        return _document(block, param, engine)
    if kind == "search_result":
        parts = _inner_parts(block.get("content"), f"{param}.content", engine)
        return [_text(f"{block.get('title', '')} ({block.get('source', '')})"), *parts]
    if kind == "tool_reference":
        return [_text(str(block.get("tool_name", "")))]
    raise invalid(param, f"{engine} cannot take content of type {kind!r}")


def _inner_parts(content: Any, param: str, engine: str) -> list[Json]:
    parts: list[Json] = []
    for index, block in enumerate(_blocks_of(content, param)):
        if block.get("type") not in ("text", "image"):
            raise invalid(f"{param}[{index}]", "must be text or an image")
        parts += _parts(block, f"{param}[{index}]", engine)
    return parts


def _image_url(source: Any, param: str, engine: str) -> str:
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "url":
        return text_of(source, "url", param)
    if kind == "base64":
        return f"data:{text_of(source, 'media_type', param)};base64,{text_of(source, 'data', param)}"
    raise invalid(param, f"{engine} takes images as base64 or url, not as {kind!r}")


def _document(block: Json, param: str, engine: str) -> list[Json]:
    source: Any = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    head = [block[key] for key in ("title", "context") if isinstance(block.get(key), str)]
    parts = [_text("\n".join(head))] if head else []
    if kind == "text":
        return [*parts, _text(text_of(source, "data", f"{param}.source"))]
    if kind == "content":
        return parts + _inner_parts(source.get("content"), f"{param}.source.content", engine)
    raise invalid(
        f"{param}.source", f"{engine} takes documents as text, not as {kind!r}: send the text of the document"
    )


def _assistant_message(content: Any, param: str, engine: str) -> Json:
    texts: list[Json] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for index, block in enumerate(_blocks_of(content, param)):
        where, kind = f"{param}[{index}]", block.get("type")
        if kind == "text":
            texts.append(_text(text_of(block, "text", where)))
        elif kind == "thinking":
            thoughts.append(text_of(block, "thinking", where))
        elif kind == "tool_use":
            calls.append(_call(block, where))
        elif kind != "redacted_thinking":  # encrypted: no engine could read it
            raise invalid(where, f"{engine} cannot take content of type {kind!r} from an assistant")
    message: Json = {"role": "assistant", "content": texts}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Json, param: str) -> Json:
    arguments = to_json(object_of(block.get("input"), f"{param}.input")).decode()
    function = {"name": text_of(block, "name", param), "arguments": arguments}
    return {"id": _engine_id(block, "id", param), "type": "function", "function": function}


def _engine_id(block: Json, key: str, param: str) -> str:
    """A call's id without the prefix that `answer.anthropic_id` gave it: some chat templates accept only ids in their
    own form, such as Mistral's nine letters and digits."""
    given = text_of(block, key, param)
    return given.removeprefix("toolu_") or given


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _content(parts: list[Json]) -> Any:
    """A single text as a string, which every chat template understands. Engines join several in their own way."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
