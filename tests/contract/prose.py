"""Wraps the prose of the project's Markdown at 120 columns: `python -m tests.contract.prose`, part of `make fmt`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.contract.documents import TOP

WIDTH = 120
PROSE = tuple(sorted([*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")]))
_FENCE = re.compile(r"\s*(```|~~~)|<!-- [\w-]+: (begin|end)")
"""Begins and ends a part that is left alone: code, or what a program writes."""
_CODE_SPAN = re.compile(r"`[^`]+`")
_SPACE_IN_CODE = "\N{NO-BREAK SPACE}"
_AS_IT_IS = re.compile(r"\s*$|\s*[|#<]|\s*\[[^\]]+\]: |-{3,}$")
"""Lines that are never joined with others: blank ones, table rows, headings, HTML, link targets, rules."""
_ITEM = re.compile(r"(\s*)([-*+]|\d+\.) +")
_BLOCK_START = re.compile(r"([-*+]|\d+[.)]) |[#>|<]")
"""A continuation line must not begin with these: Markdown would read a list item, a heading or a table."""


def wrapped(text: str) -> str:
    """The same document with each paragraph and list item filled up to WIDTH."""
    lines: list[str] = []
    for fixed, block in _blocks(text.split("\n")):
        lines += block if fixed else _filled(block)
    return "\n".join(lines)


def overlong(text: str) -> list[int]:
    """The numbers of the lines over WIDTH. Tables, code, generated parts and lines without a space are exempt."""
    found, number = [], 1
    for fixed, block in _blocks(text.split("\n")):
        found += [
            number + at for at, line in enumerate(block) if not fixed and len(line) > WIDTH and " " in line.strip()
        ]
        number += len(block)
    return found


def _blocks(lines: list[str]) -> Iterator[tuple[bool, list[str]]]:
    """The document in pieces: (True, lines to keep as they are) or (False, one paragraph or list item)."""
    paragraph: list[str] = []
    in_code = False
    for line in lines:
        fence = _FENCE.match(line) is not None
        fixed = in_code or fence or _AS_IT_IS.match(line) is not None
        in_code ^= fence
        if paragraph and (fixed or _ITEM.match(line)):
            yield False, paragraph
            paragraph = []
        if fixed:
            yield True, [line]
        else:
            paragraph.append(line)
    if paragraph:
        yield False, paragraph


def _filled(block: list[str]) -> list[str]:
    item = _ITEM.match(block[0])
    first = item[0] if item else " " * (len(block[0]) - len(block[0].lstrip()))
    words = " ".join(line.strip() for line in [block[0][len(first) :], *block[1:]])
    words = _CODE_SPAN.sub(lambda span: span[0].replace(" ", _SPACE_IN_CODE), words)  # a command stays on one line
    for width in range(WIDTH, WIDTH // 2, -1):
        lines = textwrap.wrap(
            words,
            width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        if not any(_BLOCK_START.match(line.lstrip()) for line in lines[1:]):
            return [line.replace(_SPACE_IN_CODE, " ") for line in lines]
    raise AssertionError(f"cannot wrap {words!r}")


def rewrap(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if (new := wrapped(text)) != text:
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    for document in PROSE:
        rewrap(document)
