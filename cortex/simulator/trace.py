"""Traces: which model is requested when, and how long its engine works on the answer. JSON lines or CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cortex.config.catalogue import Catalogue
from shared.settings import SettingsError

REQUIRED = ("at", "model", "secs")
MAX_PROBLEMS = 20


class Ask(NamedTuple):
    """One request: its arrival in seconds of the trace, the model id, the seconds of work at full speed, and the name
    of its API key, "" without one."""

    at: float
    model: str
    secs: float
    key: str = ""


def read_trace(path: Path, catalogue: Catalogue) -> list[Ask]:
    """The requests in order of arrival. A .csv file starts with a header line; any other file is JSON lines. Aliases
    are resolved.

    Raises:
        SettingsError: names the file and the line of every problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError([f"{path}: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise SettingsError([f"{path}: not UTF-8: {error}"]) from error
    asks: list[Ask] = []
    problems: list[str] = []
    known = {profile.id for profile in catalogue.models}
    for number, row in _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text):
        try:
            asks.append(_ask(row, catalogue, known))
        except ValueError as error:
            problems.append(f"{path}: line {number}: {error}")
            if len(problems) >= MAX_PROBLEMS:
                problems.append(f"{path}: possibly more problems")
                break
    if not asks and not problems:
        problems.append(f"{path}: no requests")
    if problems:
        raise SettingsError(problems)
    asks.sort(key=lambda ask: ask.at)
    return asks


def write_trace(path: Path, asks: Iterable[Ask]) -> None:
    """Writes a trace in the format implied by the file name."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Ask._fields)
            writer.writerows(asks)
        else:
            file.writelines(json.dumps(ask._asdict()) + "\n" for ask in asks)


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(text.splitlines())
    for row in reader:
        yield reader.line_num, row


def _ask(row: Any, catalogue: Catalogue, known: set[str]) -> Ask:
    if not isinstance(row, dict):
        raise ValueError(  # noqa: TRY004 - of the file's contents
            'not a JSON object such as {"at": 1.5, "model": "small", "secs": 3}'
        )
    missing = [name for name in REQUIRED if row.get(name) is None]
    if missing:
        raise ValueError(f"{missing[0]}: required, but missing")
    model = catalogue.resolve(str(row["model"]))
    if model not in known:
        raise ValueError(f"model = {row['model']!r}: not in the catalogue")
    return Ask(_secs(row, "at"), model, _secs(row, "secs"), str(row.get("key") or ""))


def _secs(row: dict[str, Any], name: str) -> float:
    value = row[name]
    try:
        secs = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        secs = math.nan
    if not (math.isfinite(secs) and secs >= 0):
        raise ValueError(f"{name} = {value!r}: must be a number of seconds, 0 or more")
    return secs
