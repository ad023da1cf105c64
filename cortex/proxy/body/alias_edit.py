"""Applies an alias's parameters to a request's body, without changing any other byte. Pure.

The same as decoding the body, editing it and encoding it again, but numbers, white space, the order of members and
duplicates among the others stay as the client wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from cortex.config.aliases import MemberEdit, Rewrite
from cortex.proxy.body.form_scan import FormPart, FormScan, delimiter_of
from cortex.proxy.body.json_scan import Member, Scan, TooIntricateError
from cortex.proxy.body.model_field import find_model, find_or_add_model, form_part, replaced
from cortex.proxy.body.request_fields import JsonModel, ModelField
from shared.errors import InvalidRequest

Splice: TypeAlias = tuple[int, int, bytes]
"""Bytes from the first to the second position, and what takes their place."""

Edits: TypeAlias = Mapping[str, MemberEdit]


def with_model_id(
    body: bytes, content_type: str, aliases: Mapping[str, Rewrite], default: str | None
) -> tuple[bytes, str, str, str, ModelField]:
    """The body as an engine gets it, the model as the client names it, its name here (an id, or `id@variant`), its id,
    and the fields of that body. `default`: the model of a body that names none.

    Raises:
        InvalidRequest: it names none, or cannot be read.
    """
    field, body = find_or_add_model(body, content_type, default)
    rewrite = aliases.get(field.model)
    if rewrite is None:
        return body, field.model, field.model, field.model, field
    asked, body = field.model, rewritten(body, content_type, field, rewrite)
    if rewrite.edits is not None and isinstance(field, JsonModel):
        field = find_model(body, content_type)
    return body, asked, rewrite.name, rewrite.model_id, field


def rewritten(body: bytes, content_type: str, field: ModelField, rewrite: Rewrite) -> bytes:
    """`body`, in which `field` was found, as an engine gets it.

    Raises:
        InvalidRequest: finding the members to edit would take too long.
    """
    if rewrite.edits is None:
        return replaced(field, body, rewrite.model_id)
    if isinstance(field, JsonModel):
        try:
            return spliced(body, json_splices(body, rewrite.edits))
        except TooIntricateError as error:
            message = f"the body is too complex for the parameters of the alias {field.model!r}: it has {error}"
            raise InvalidRequest(f"{message}. Use the model's id: {rewrite.name}", param="model") from error
    delimiter = delimiter_of(content_type)
    scan = FormScan(delimiter)
    scan.feed(body)
    return spliced(body, form_splices(scan.parts, delimiter, rewrite.edits))


def spliced(body: bytes, splices: Iterable[Splice]) -> bytes:
    """A copy of the body; the splices are in order and do not overlap."""
    view, at = memoryview(body), 0
    pieces: list[bytes | memoryview] = []
    for start, end, value in splices:
        pieces += (view[at:start], value)
        at = end
    return b"".join((*pieces, view[at:]))


def json_splices(body: bytes, edits: Edits) -> list[Splice]:
    """For a valid JSON object in UTF-8. Of several members of the same name the last counts, as for `json.loads`.

    Raises:
        TooIntricateError: it would take too long.
    """
    return list(_of_object(body, Scan(body), body.find(b"{"), edits))


def _of_object(body: bytes, scan: Scan, start: int, edits: Edits) -> Iterator[Splice]:
    members = list(scan.members(start))
    longest = max(map(len, edits), default=0)
    names = [scan.name(member, longest) for member in members]
    last = {name: place for place, name in enumerate(names)}
    dropped = {name for name, edit in edits.items() if edit.action == "drop"}
    kept = False
    for place, (name, member) in enumerate(zip(names, members, strict=True)):
        if name in dropped:
            yield _cut(members, place, first=not kept)
            continue
        kept = True
        if name is not None and name in edits and last[name] == place:
            yield from _of_member(body, scan, member, edits[name])
    added = [b"%b: %b" % (json.dumps(name).encode(), value) for name, value in _missing(edits, last)]
    if added:
        end = members[-1].end if members else start + 1
        yield end, end, b", ".join([b"", *added] if kept else added)


def _cut(members: list[Member], place: int, *, first: bool) -> Splice:
    """A member with one of the commas beside it. `first`: none is kept before it."""
    if not first:
        return members[place - 1].end, members[place].end, b""
    ends = place + 1 == len(members)
    return members[place].start, members[place].end if ends else members[place + 1].start, b""


def _missing(edits: Edits, present: Mapping[str | None, int]) -> Iterator[tuple[str, bytes]]:
    return ((name, edit.value) for name, edit in edits.items() if edit.value and name not in present)


def _of_member(body: bytes, scan: Scan, member: Member, edit: MemberEdit) -> Iterator[Splice]:
    if edit.action == "set":
        yield member.value, member.end, edit.value
    elif edit.action == "merge":
        if body[member.value : member.value + 1] == b"{":
            yield from _of_object(body, scan, member.value, edit.members)
        elif edit.overrides:
            yield member.value, member.end, edit.value


def form_splices(parts: list[FormPart], delimiter: bytes, edits: Edits) -> list[Splice]:
    """For a multipart form with these complete parts. A list becomes a field for each element, a table its JSON; keys
    inside of tables are not dropped or merged. Files stay."""
    present = {part.name for part in parts}
    gone = {name for name, edit in edits.items() if edit.action in ("set", "drop") or edit.overrides}
    splices = [(part.start, part.next, b"") for part in parts if part.name in gone]
    added = [
        form_part(delimiter, name, text)
        for name, edit in edits.items()
        if edit.value and (name in gone or name not in present)
        for text in _form_texts(edit.value)
    ]
    end = parts[-1].next if parts else 0
    return [*splices, (end, end, b"".join(added))] if added else splices


def _form_texts(value: bytes) -> list[str]:
    decoded = json.loads(value)
    values = decoded if isinstance(decoded, list) else [decoded]
    return [each if isinstance(each, str) else json.dumps(each) for each in values]
