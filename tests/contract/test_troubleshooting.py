"""docs/troubleshooting.md has an entry for every error code, and no other."""

from __future__ import annotations

import re

import pytest

from shared.protocol import ErrorCode
from tests.contract.documents import TOP

ENTRIES = (TOP / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("\n## By error code\n")[2]
BY_CODE = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^### |\Z)", ENTRIES, re.MULTILINE | re.DOTALL))


def test_every_code_has_its_entry() -> None:
    """In alphabetical order, each once."""
    assert re.findall(r"^### (.*)$", ENTRIES, re.MULTILINE) == [f"`{code}`" for code in sorted(map(str, ErrorCode))]


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_an_entry_says_what_it_means_why_and_what_to_do(code: str) -> None:
    """Each of the three has some words."""
    meaning, cause, advice = re.split(r"^- \*\*(?:Usual cause|What to do):\*\*", BY_CODE[code], flags=re.MULTILINE)
    assert all(len(part.split()) >= 4 for part in (meaning, cause, advice)), BY_CODE[code]


def test_codes_in_the_symptoms_are_linked_to_their_entries() -> None:
    """A link to an entry names the code that it leads to."""
    text = (TOP / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`(\w+)`\]\(#(\w+)\)", text)
    assert links
    assert [link for link in links if link[0] != link[1] or link[0] not in BY_CODE] == []
