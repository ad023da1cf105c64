"""Phrases that this project does not use, and where they occur: `python -m tests.contract.language [PATH …]`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.contract.documents import TOP

BANNED = re.compile(
    r"\b("
    r"somebody|nobody|whoever|whomever|everybody|anybody"
    r"|for ever|in vain|of late|so long|with figures|hence|thereof|whereupon|shall"
    r"|him|who (?:has|have|had)|those who|he who"
    r"|(?:makes?|made|making) way"
    r"|(?<!there )is no (?!longer\b)\w+"
    r"|(?:is|are) not there"
    r"|(?<!there )are no (?!longer\b)\w+"
    r"|(?:that|which) (?:is|are) none"
    r"|hears? (?:of|nothing)|of long ago|all the same|anew"
    r"|is spoken"
    r")\b",
    re.IGNORECASE,
)
"""Archaic or impersonal phrases that the code base used to be full of. A native speaker names the subject."""

SUFFIXES = (".py", ".md", ".toml")
EXEMPT = frozenset({"tests/contract/language.py", "LICENSE"})


def text_files() -> list[Path]:
    """Every tracked or new text file that the rule applies to."""
    command = ["git", "-C", str(TOP), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    paths = [TOP / name for name in names if name.endswith(SUFFIXES) and name not in EXEMPT]
    return [path for path in paths if path.exists()]


def violations(path: Path) -> Iterator[str]:
    """`file:line: phrase` for each banned phrase, in names such as `test_nobody_waits` too."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for match in BANNED.finditer(line.replace("_", " ")):
            yield f"{path.relative_to(TOP)}:{number}: {match[0]!r} in: {line.strip()[:120]}"


if __name__ == "__main__":
    wanted = [Path(argument).resolve() for argument in sys.argv[1:]] or [TOP]
    for file in text_files():
        if any(file.is_relative_to(path) for path in wanted):
            print(*violations(file), sep="\n", end="\n" if [*violations(file)] else "")
