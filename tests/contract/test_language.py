"""Plain present-day English in code, messages and documents, whose prose is wrapped at one width."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.documents import TOP
from tests.contract.language import text_files, violations
from tests.contract.prose import PROSE, overlong, wrapped


def test_no_banned_phrase_is_left() -> None:
    """`tests/contract/language.py` has the list; rewrite the sentence, do not extend the exemptions."""
    files = text_files()
    assert files
    assert [line for path in files for line in violations(path)] == []


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(TOP)))
def test_prose_is_at_most_120_columns_wide(path: Path) -> None:
    """`make fmt` wraps it. Tables and code may be wider."""
    assert overlong(path.read_text(encoding="utf-8")) == [], "run `make fmt`"


def test_wrapping_keeps_code_tables_and_lists() -> None:
    """Paragraphs and list items are filled; a number that comes to the start of a line does not become a list item."""
    code, row = "```\n" + "x " * 90 + "\n```", "| " + "cell " * 40 + "|"
    word = "word " * 23
    text = f"# Title\n\n{word}\n1. one\n- {word}\n  {word}\n\n{code}\n\n{row}\n"
    found = wrapped(text).split("\n")
    assert [line for line in found if len(line) > 120] == [code.split("\n")[1], row]
    assert found[3:7] == ["1. one", "- " + word.strip(), "  " + word.strip(), ""]
    assert wrapped("\n".join(found)) == "\n".join(found)
    numbered = wrapped("word " * 24 + "2. more")
    assert numbered.split("\n")[1] == "word 2. more"
