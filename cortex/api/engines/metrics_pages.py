"""Several Prometheus pages as one, each with labels of its own. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_COMMENT: Final = re.compile(r"# (HELP|TYPE) ([A-Za-z_:][\w:]*)(?: (.*))?", re.ASCII)
_LABELS: Final = r'\s*[A-Za-z_]\w*\s*=\s*"(?:[^"\\]|\\.)*"\s*'
_SAMPLE: Final = re.compile(
    rf"([A-Za-z_:][\w:]*)\s*(?:\{{((?:{_LABELS})(?:,{_LABELS})*,?|)\s*\}}\s*|\s)([^\s{{}}]+)(?:\s+(-?\d+))?\s*",
    re.ASCII,
)
_NAMES: Final = re.compile(r'([A-Za-z_]\w*)(\s*=\s*"(?:[^"\\]|\\.)*")', re.ASCII)
_TYPES: Final = {"counter", "gauge", "histogram", "summary", "untyped"}
_SUFFIXES: Final = ("", "_bucket", "_count", "_sum")


class MetricsPages:
    """Collects pages in Prometheus text. Each family stands once in the result, as the format demands: the first page
    that has it says what it is."""

    def __init__(self) -> None:
        self._comments: dict[str, dict[str, str]] = {}  # by family: HELP and TYPE
        self._samples: dict[str, list[str]] = {}  # by family

    def add(self, page: str, labels: Mapping[str, str]) -> int:
        """Adds the samples of a page with these labels. A label that a sample has by the same name is kept as
        `exported_NAME`. Returns how many samples there were; lines that are not Prometheus text are left out."""
        ours = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
        family, added = "", 0
        for line in page.split("\n"):
            if line.startswith("#"):
                comment = _COMMENT.fullmatch(line.rstrip())
                if comment is not None:
                    family = comment[2]
                    self._note(family, comment[1], comment[3] or "")
                continue
            sample = _SAMPLE.fullmatch(line)
            if sample is None or not _is_number(sample[3]):
                continue
            name, theirs, value, at = sample.groups()
            if not any(name == family + suffix for suffix in _SUFFIXES):
                family = name
            kept = _NAMES.sub(lambda found: _renamed(found, labels), theirs or "").strip().rstrip(",")
            text = f"{name}{{{','.join(filter(None, (ours, kept)))}}} {value}{'' if at is None else f' {at}'}"
            self._samples.setdefault(family, []).append(text)
            added += 1
        return added

    def text(self) -> str:
        """The page, without families that have no sample."""
        lines: list[str] = []
        for family, samples in self._samples.items():
            comments = self._comments.get(family, {})
            lines += (f"# {kind} {family} {comments[kind]}" for kind in ("HELP", "TYPE") if kind in comments)
            lines += samples
        return "\n".join((*lines, ""))

    def _note(self, family: str, kind: str, text: str) -> None:
        if kind == "HELP" or text in _TYPES:
            self._comments.setdefault(family, {}).setdefault(kind, text)


def escaped(value: str) -> str:
    """A label's value as Prometheus text writes it."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _renamed(found: re.Match[str], labels: Mapping[str, str]) -> str:
    return f"exported_{found[0]}" if found[1] in labels else found[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
