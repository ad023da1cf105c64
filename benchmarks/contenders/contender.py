"""A contender as the runner sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


class ContenderUnavailable(Exception):
    """A contender that cannot be installed or started here; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a contender runs. `directory` is empty and temporary."""

    engine_port: int
    port: int
    directory: Path

    @property
    def engine_url(self) -> str:
        """The fake engine's base URL."""
        return f"http://127.0.0.1:{self.engine_port}"


@dataclass(frozen=True)
class Launch:
    """How to start a contender. `companions` start before it and are not measured."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    companions: list[list[str]] = field(default_factory=list)
    version: str = ""


@dataclass(frozen=True)
class Contender:
    """`prepare` raises ContenderUnavailable; it may take minutes (an installation), and writes configuration files.

    `switched_on` says which features were on during the measurement. `slowness` divides the amount of work it gets:
    measuring a gateway that takes milliseconds for a request would otherwise take an hour.
    """

    name: str
    title: str
    switched_on: str
    prepare: Callable[[Place], Launch]
    slowness: int = 1
    workers: int = 1
    start_secs: float = 30.0
