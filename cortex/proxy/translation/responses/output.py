"""The output items of a response, made of what a chat's answer says, and the events that tell of them. Pure.

An item for the model's reasoning, one for its words and one for each call, in the order in which they begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from cortex.proxy.translation.chat_answer import ChatCall, ChatCalls, content_text, reasoning_of, said_in
from cortex.proxy.translation.interface import Json
from cortex.proxy.translation.responses.tools import CalledTool, CustomInput, ToolSet

OutputEvent = tuple[str, Json]
"""An event's type without `response.`, and its fields but the number."""

COMPLETED: Final = "completed"


class _Item(Protocol):
    id: str
    index: int
    status: str

    def close(self, status: str) -> Iterator[OutputEvent]: ...

    def view(self) -> Json: ...


class _Part:
    """A part of a message, or of reasoning: `field` is where its text is, `event` what its events are named."""

    def __init__(self, kind: str, field: str, event: str) -> None:
        self.kind = kind
        self.field = field
        self.event = event
        self.texts: list[str] = []
        self.logprobs: list[Json] = []

    def view(self) -> Json:
        view: Json = {"type": self.kind, self.field: "".join(self.texts)}
        return view | {"annotations": [], "logprobs": list(self.logprobs)} if self.kind == "output_text" else view

    def with_logprobs(self, fields: Json, logprobs: list[Json]) -> Json:
        return fields | {"logprobs": logprobs} if self.kind == "output_text" else fields


_PARTS: Final = {
    "output_text": ("text", "output_text"),
    "refusal": ("refusal", "refusal"),
    "reasoning_text": ("text", "reasoning_text"),
}


class _TextItem:
    """A message, or the model's reasoning."""

    def __init__(self, index: int, item_id: str, *, reasoning: bool) -> None:
        self.index = index
        self.id = item_id
        self.reasoning = reasoning
        self._parts: list[_Part] = []
        self.status = "in_progress"

    def view(self) -> Json:
        content = [part.view() for part in self._parts]
        if self.reasoning:
            return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": self.status}
        return {"id": self.id, "type": "message", "role": "assistant", "status": self.status, "content": content}

    def add(self, kind: str, text: str, logprobs: list[Json]) -> Iterator[OutputEvent]:
        if not self._parts or self._parts[-1].kind != kind:
            yield from self._close_part()
            self._parts.append(_Part(kind, *_PARTS[kind]))
            yield "content_part.added", self._place() | {"part": self._parts[-1].view()}
        part = self._parts[-1]
        part.texts.append(text)
        part.logprobs += logprobs
        yield f"{part.event}.delta", part.with_logprobs(self._place() | {"delta": text}, logprobs)

    def close(self, status: str) -> Iterator[OutputEvent]:
        yield from self._close_part()
        self.status = status

    def _close_part(self) -> Iterator[OutputEvent]:
        if self._parts:
            part = self._parts[-1]
            view = part.view()
            yield (
                f"{part.event}.done",
                part.with_logprobs(self._place() | {part.field: view[part.field]}, part.logprobs),
            )
            yield "content_part.done", self._place() | {"part": view}

    def _place(self) -> Json:
        return {"item_id": self.id, "output_index": self.index, "content_index": len(self._parts) - 1}


class _CallItem:
    """A call of a function, or of a custom tool, whose input is text."""

    def __init__(self, index: int, item_id: str, call_id: str, tool: CalledTool) -> None:
        self.index = index
        self.id = item_id
        self.call_id = call_id
        self._tool = tool
        self._arguments: list[str] = []
        self._input = CustomInput() if tool.custom else None
        self.status = "in_progress"

    def view(self) -> Json:
        view: Json = {"id": self.id, "call_id": self.call_id, "name": self._tool.name, "status": self.status}
        if self._tool.namespace is not None:
            view["namespace"] = self._tool.namespace
        if self._input is not None:
            return view | {"type": "custom_tool_call", "input": self._input.text}
        return view | {"type": "function_call", "arguments": "".join(self._arguments)}

    def add(self, piece: str) -> Iterator[OutputEvent]:
        self._arguments.append(piece)
        yield from self._delta(piece if self._input is None else self._input.add(piece))

    def close(self, status: str) -> Iterator[OutputEvent]:
        arguments = "".join(self._arguments)
        place = {"item_id": self.id, "output_index": self.index}
        if self._input is None:
            yield "function_call_arguments.done", place | {"name": self._tool.name, "arguments": arguments}
        else:
            yield from self._delta(self._input.finish(arguments))
            yield "custom_tool_call_input.done", place | {"input": self._input.text}
        self.status = status

    def _delta(self, text: str) -> Iterator[OutputEvent]:
        if text:
            kind = "function_call_arguments" if self._input is None else "custom_tool_call_input"
            yield f"{kind}.delta", {"item_id": self.id, "output_index": self.index, "delta": text}


class Output:
    """All items. The methods that change it yield the events of the change."""

    def __init__(self, tools: ToolSet, unique: str) -> None:
        """`unique` is a part of every item's id."""
        self._tools = tools
        self._unique = unique
        self._items: list[_Item] = []
        self._open: list[_Item] = []
        self._speaking: _TextItem | None = None
        self._calls = ChatCalls()
        self._call_items: dict[ChatCall, _CallItem] = {}  # an item begins when its name is known

    @property
    def calls_are_complete(self) -> bool:
        return self._calls.complete

    def view(self) -> list[Json]:
        return [item.view() for item in self._items]

    def take(self, choice: Json) -> Iterator[OutputEvent]:
        """What the choice of a chunk, or of a whole answer, adds."""
        said = said_in(choice) or {}
        reasoning = reasoning_of(said)
        if reasoning:
            yield from self._say("reasoning_text", reasoning, [])
        content = content_text(said.get("content"))
        if content:
            yield from self._say("output_text", content, _logprobs_of(choice))
        refusal = content_text(said.get("refusal"))
        if refusal:
            yield from self._say("refusal", refusal, [])
        for call in self._calls.take(choice):
            if call in self._call_items or call.name:
                yield from self._continue_call(call)

    def close(self, status: str) -> Iterator[OutputEvent]:
        """Ends all items. `status` is that of the last one: only that one can be incomplete."""
        for call in self._calls.found:
            if call not in self._call_items:
                yield from self._continue_call(call)
        while self._open:
            item = self._open[0]
            yield from self._close(item, status if item is self._items[-1] else COMPLETED)

    def abandon(self) -> None:
        """Ends all items as incomplete, without events."""
        for item in self._open:
            item.status = "incomplete"
        self._open = []

    def _say(self, kind: str, text: str, logprobs: list[Json]) -> Iterator[OutputEvent]:
        reasoning = kind == "reasoning_text"
        item = self._speaking
        if item is None or item.reasoning != reasoning:
            yield from self._fall_silent()
            item = _TextItem(len(self._items), self._new_id("rs" if reasoning else "msg"), reasoning=reasoning)
            yield self._begin(item)
            self._speaking = item
        yield from item.add(kind, text, logprobs)

    def _continue_call(self, call: ChatCall) -> Iterator[OutputEvent]:
        item = self._call_items.get(call)
        if item is None:
            yield from self._fall_silent()
            tool = self._tools.called(call.name)
            item_id = self._new_id("ctc" if tool.custom else "fc")
            item = _CallItem(len(self._items), item_id, call.call_id or self._new_id("call"), tool)
            self._call_items[call] = item
            yield self._begin(item)
        arguments = call.more_arguments()
        if arguments:
            yield from item.add(arguments)

    def _begin(self, item: _Item) -> OutputEvent:
        self._items.append(item)
        self._open.append(item)
        return "output_item.added", {"output_index": item.index, "item": item.view()}

    def _fall_silent(self) -> Iterator[OutputEvent]:
        if self._speaking is not None:
            yield from self._close(self._speaking, COMPLETED)
            self._speaking = None

    def _close(self, item: _Item, status: str) -> Iterator[OutputEvent]:
        self._open.remove(item)
        yield from item.close(status)
        yield "output_item.done", {"output_index": item.index, "item": item.view()}

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._unique}{len(self._items):02x}"


def _logprobs_of(choice: Json) -> list[Json]:
    """The log probabilities of a choice's text, in the shape that both APIs share."""
    given = choice.get("logprobs")
    content = given.get("content") if isinstance(given, dict) else None
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
