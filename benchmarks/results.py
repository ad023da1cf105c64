"""The figures of a run: kept by round, summed up by their median."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases.case import Measured

BASE = "nginx"
"""The contender that others are compared with."""


@dataclass
class Cell:
    """One contender in one case: the figures of each round, and everything that went wrong."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    notes: set[str] = field(default_factory=set)

    def add(self, measured: Measured) -> None:
        """Adds a round, empty if nothing could be measured."""
        self.rounds.append(measured.figures)
        self.faults += measured.faults
        self.notes |= set(measured.notes)

    def values(self, figure: str) -> list[float]:
        """One figure, round by round."""
        return [figures[figure] for figures in self.rounds if figure in figures]

    def median(self, figure: str) -> float | None:
        """The median over the rounds, None when it was not measured."""
        values = self.values(figure)
        return median(values) if values else None

    def spread(self, figure: str) -> tuple[float, float] | None:
        """The least and the greatest of the rounds."""
        values = self.values(figure)
        return (min(values), max(values)) if values else None


@dataclass
class Results:
    """A whole run. `contenders`: name to title, version and what is switched on; `skipped`: name to reason."""

    machine: dict[str, str]
    settings: dict[str, Any]
    contenders: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)  # by case, then by contender

    def cell(self, case: str, contender: str) -> Cell:
        """Created if missing."""
        return self.cells.setdefault(case, {}).setdefault(contender, Cell())

    def find(self, case: str, contender: str) -> Cell | None:
        """None when it was not measured."""
        return self.cells.get(case, {}).get(contender)

    def figure(self, case: str, contender: str, figure: str) -> float | None:
        """A median, None when it was not measured."""
        cell = self.find(case, contender)
        return None if cell is None else cell.median(figure)

    def ratio(self, case: str, contender: str, figure: str, base: str = BASE) -> float | None:
        """How often the base's figure: the median of the rounds' own ratios, since what the machine does meanwhile
        hits the neighbours of one round alike."""
        cell, other = self.find(case, contender), self.find(case, base)
        if cell is None or other is None:
            return None
        pairs = [
            (ours.get(figure), theirs.get(figure)) for ours, theirs in zip(cell.rounds, other.rounds, strict=False)
        ]
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
        return median(ratios) if ratios else None

    def foreign(self) -> float | None:
        """The share of the gateway's CPU that others had, at the median over everything that was measured with one
        worker; None when nothing was."""
        shares = [
            share
            for cells in self.cells.values()
            for name, cell in cells.items()
            if name in self.contenders and self.contenders[name]["workers"] == "1"
            for share in cell.values("foreign")
        ]
        return median(shares) if shares else None

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(self._as_json(), indent=1, sort_keys=False) + "\n", encoding="utf-8")

    def _as_json(self) -> dict[str, Any]:
        cases: dict[str, Any] = {}
        for case, cells in self.cells.items():
            cases[case] = {}
            for name, cell in cells.items():
                figures = sorted({figure for round_ in cell.rounds for figure in round_})
                cases[case][name] = {
                    "median": {figure: _rounded(cell.median(figure)) for figure in figures},
                    "ratio_to_nginx": {figure: _rounded(self.ratio(case, name, figure)) for figure in figures},
                    "rounds": [{figure: _rounded(value) for figure, value in r.items()} for r in cell.rounds],
                    "faults": dict(cell.faults),
                    "notes": sorted(cell.notes),
                }
        return {
            "machine": self.machine,
            "settings": self.settings,
            "contenders": self.contenders,
            "skipped": self.skipped,
            "cases": cases,
        }


def load(path: Path) -> Results:
    """Reads what `save` wrote.

    Raises:
        OSError, ValueError, KeyError: the file is missing or holds something else.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    results = Results(value["machine"], value["settings"], value["contenders"], value["skipped"])
    for case, cells in value["cases"].items():
        for name, cell in cells.items():
            results.cells.setdefault(case, {})[name] = Cell(cell["rounds"], Counter(cell["faults"]), set(cell["notes"]))
    return results


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
