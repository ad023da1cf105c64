"""Reads the project's own documents: sections, tables, examples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).parents[2]
DOCUMENTS = (TOP / "README.md", *sorted((TOP / "docs").glob("*.md")))


@dataclass(frozen=True)
class Example:
    """A fenced TOML block, with the name of the file it shows."""

    document: str
    number: int
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}-{self.number}-{self.file}"


def examples() -> list[Example]:
    """Every fenced toml block of every document that starts with the comment `# FILE.toml`."""
    found: list[Example] = []
    for path in DOCUMENTS:
        blocks = re.findall(r"^```toml\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for number, text in enumerate(blocks):
            name = re.match(r"# (\w+\.toml)", text)
            found.append(Example(path.name, number, name[1] if name else "", text))
    return found
