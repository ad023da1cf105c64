"""Several Prometheus pages as one, each with labels of its own. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

MAX_LINE: Final = 64 << 10
"""Longer lines are left out: matching one with many labels takes a hundred times its memory."""
# No two neighbours here can match the same blanks: a line may be long, and backtracking must not take its square.
_COMMENT: Final = re.compile(r"# (HELP|TYPE) ([A-Za-z_:][\w:]*)(?: (.*))?", re.ASCII)
_LABEL: Final = r'[A-Za-z_]\w*[ \t]*=[ \t]*"[^"\\]*(?:\\.[^"\\]*)*"'
_LABELS: Final = rf"(?:{_LABEL}(?:[ \t]*,[ \t]*{_LABEL})*)?"
_SAMPLE: Final = re.compile(
    rf"([A-Za-z_:][\w:]*)[ \t]*(?:\{{[ \t]*({_LABELS})[ \t]*(?:,[ \t]*)?\}}[ \t]*|[ \t])"
    r"([^\s{}]+)(?:[ \t]+(-?\d{1,18}))?",
    re.ASCII,
)
_NAMES: Final = re.compile(r'([A-Za-z_]\w*)[ \t]*=[ \t]*("[^"\\]*(?:\\.[^"\\]*)*")', re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_NO_NUMBER: Final = re.compile(r"[+-]?inf(?:inity)?|nan", re.ASCII | re.IGNORECASE)
_TYPES: Final = {"counter", "gauge", "histogram", "summary", "untyped"}
_SUFFIXES: Final = ("", "_bucket", "_count", "_sum")


class MetricsPages:
    """Collects pages in Prometheus text. Each family appears once, as the format requires; the first page that has it
    says what it is."""

    def __init__(self) -> None:
        self._comments: dict[str, dict[str, str]] = {}  # by family: HELP and TYPE
        self._samples: dict[str, list[str]] = {}  # by family

    def add(self, page: str, labels: Mapping[str, str]) -> int:
        """Adds the samples of a page with these labels. A label that a sample has by the same name is kept as
        `exported_NAME`, as Prometheus does it. Returns how many samples there were. Lines that Prometheus would refuse
        are left out, because it would refuse the whole page for one of them."""
        ours = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
        family, added = "", 0
        for line in map(str.rstrip, page.split("\n")):
            if len(line) > MAX_LINE:
                continue
            if line.startswith("#"):
                comment = _COMMENT.fullmatch(line)
                if comment is not None:
                    family = comment[2]
                    self._note(family, comment[1], comment[3] or "")
                continue
            sample = _SAMPLE.fullmatch(line)
            if sample is None or not _is_value(sample[3]):
                continue
            name, theirs, value, at = sample.groups()
            kept = _beside(labels, theirs or "")
            if kept is None:
                continue
            if not any(name == family + suffix for suffix in _SUFFIXES):
                family = name
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


def _beside(ours: Mapping[str, str], theirs: str) -> str | None:
    """The labels of a sample, renamed where ours have the name. None if it has a name twice."""
    labels = _NAMES.findall(theirs)
    taken = {name for name, _ in labels}
    if len(taken) < len(labels):
        return None
    taken |= ours.keys()
    kept = []
    for name, value in labels:
        free = name
        if name in ours:
            while free in taken:
                free = f"exported_{free}"
            taken.add(free)
        kept.append(f"{free}={value}")
    return ",".join(kept)


def _is_value(text: str) -> bool:
    """Whether Prometheus takes it, which refuses numbers that do not fit a float, and `-nan`."""
    if _NUMBER.fullmatch(text):
        return math.isfinite(float(text))
    return _NO_NUMBER.fullmatch(text) is not None
