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


def documented_keys(file: str) -> dict[str, dict[str, str]]:
    """docs/configuration.md on one file: table (as `[a.b]`, `[[a]]`, or "" at the top level) -> key -> its row."""
    text = (TOP / "docs" / "configuration.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"\n## {file}\n")[2], flags=re.MULTILINE)[0]
    tables: dict[str, dict[str, str]] = {}
    for part in re.split(r"^### ", section, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        table = "" if title == "Top level" else title.strip("`")
        rows = re.finditer(r"^\| `(\w+)` \|.*$", body, re.MULTILINE)
        tables[table] = {row[1]: row[0] for row in rows}
    return tables


def documented_reloads(effect: str) -> list[str]:
    """docs/configuration.md on reloads: the code spans of the change column in the row whose effect starts so."""
    text = (TOP / "docs" / "configuration.md").read_text(encoding="utf-8")
    section = text.partition("\n## What happens when a file changes?\n")[2].partition("\n## ")[0]
    (row,) = re.findall(rf"^\| ([^|]+) \| {re.escape(effect)}", section, re.MULTILINE)
    return re.findall(r"`([^`]+)`", row)
