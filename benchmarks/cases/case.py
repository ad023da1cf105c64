"""Types and helpers that the cases share."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from benchmarks.load.check import AnswerCounts
from benchmarks.measure.machine import busy_secs
from benchmarks.measure.tree import ProcessTree

TIMEOUT_SECS = 150.0
"""Limit for one measurement of one contender; requests unanswered by then count as faults."""


@dataclass(frozen=True)
class Subject:
    """A contender that serves on `port`, with `workers` processes. The engine listens on `answering_port`, which is
    `engine_port` unless the contender is an engine itself. `slowness` divides its amount of work; `quick` reduces it
    for every contender.
    """

    port: int
    engine_port: int
    answering_port: int
    tree: ProcessTree
    slowness: int = 1
    quick: bool = False
    workers: int = 1

    def amount(self, full: int, quick: int, at_least: int = 1) -> int:
        """How many requests or streams to send."""
        return max(at_least, (quick if self.quick else full) // self.slowness)


@dataclass
class Measured:
    """One measurement: figures by name (the name ends with the unit), and counts of faults."""

    figures: dict[str, float] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """`key` names the figure that compares contenders. `fresh`: needs a newly started process."""

    name: str
    title: str
    key: str
    measure: Callable[[Subject], Awaitable[Measured]]
    fresh: bool = False


@dataclass
class Span:
    """Cost of a piece of work. CPU time covers the contender's process tree."""

    cpu_ns: int = 0
    wall_secs: float = 0.0
    peak_rss_bytes: int = 0
    foreign: float = 0.0
    """The share of the contender's CPUs that other processes used. Do not trust the figures if it is far from 0."""

    @property
    def busy(self) -> float:
        """CPUs in use on average: 1.0 is one CPU all the time."""
        return self.cpu_ns / 1e9 / self.wall_secs


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keeps this process's garbage collector from being measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.asynccontextmanager
async def spanned(tree: ProcessTree) -> AsyncIterator[Span]:
    """Measures the body; the span is filled when the body has ended."""
    span = Span()
    await asyncio.sleep(0.05)  # let earlier work finish
    with no_collections():
        cpus = tree.cpus()
        tree.forget_peak()
        all_busy = busy_secs(cpus)
        cpu, began = tree.cpu_ns(), time.perf_counter()
        async with tree.watched():
            yield span
        span.wall_secs = time.perf_counter() - began
        span.cpu_ns = tree.cpu_ns() - cpu
        others = busy_secs(cpus) - all_busy - span.cpu_ns / 1e9
        span.foreign = max(0.0, others / span.wall_secs)
        span.peak_rss_bytes = tree.peak_rss_bytes()


def noted(counted: AnswerCounts, figures: dict[str, float]) -> Measured:
    """The figures, with the faults among the answers."""
    notes = [] if counted.unchanged == counted.answers else ["rewrites the answers"]
    return Measured(figures, counted.faults, notes)
