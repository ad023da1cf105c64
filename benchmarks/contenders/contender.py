"""A contender as the runner sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


class ContenderUnavailable(Exception):
    """A contender that cannot be installed or started here; the message says why."""


@dataclass(frozen=True)
class Place:
    """Inputs for starting a contender. `directory` is empty and temporary."""

    engine_port: int
    port: int
    directory: Path

    @property
    def engine_url(self) -> str:
        """The fake engine's base URL."""
        return f"http://127.0.0.1:{self.engine_port}"


@dataclass(frozen=True)
class Launch:
    """How to start it. `companions` are started before it and are not measured."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    companions: list[list[str]] = field(default_factory=list)
    version: str = ""


@dataclass(frozen=True)
class Contender:
    """`prepare` raises ContenderUnavailable; it may take minutes (an installation), and writes configuration files.

    `switched_on` says what it does for its figures. `slowness` divides the amount of work that it is given: a gateway
    that takes milliseconds for a request would be measured for an hour.
    """

    name: str
    title: str
    switched_on: str
    prepare: Callable[[Place], Launch]
    slowness: int = 1
    workers: int = 1
    start_secs: float = 30.0
