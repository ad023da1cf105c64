"""The time to the first byte of a stream at light load, and how much of it is the gateway's."""

from __future__ import annotations

import asyncio

from benchmarks.cases.case import TIMEOUT_SECS, Case, Measured, Subject, no_collections, noted
from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.load.check import AnswerCounts
from benchmarks.load.drive import repeat
from benchmarks.load.pool import Pool
from benchmarks.load.request import chat_request

_SPEC = AnswerSpec(chunks=4)
_PAUSE_SECS = 0.001
_BLOCK = 100


def percentile(values: list[int], share: float) -> float:
    """The smallest value that is not below `share` of all values."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


async def _first_byte(subject: Subject) -> Measured:
    """One request at a time, alternating between a hundred through the gateway and a hundred directly to the engine,
    so that other load on the machine affects both. The difference of the percentiles is what the gateway adds."""
    count = subject.amount(2000, 600, at_least=_BLOCK)
    through, straight = AnswerCounts(), AnswerCounts()
    with no_collections():
        async with Pool(subject.port, 1) as via, Pool(subject.engine_port, 1) as direct:
            for pool, port, sums in ((via, subject.port, None), (direct, subject.engine_port, None)):
                await _block(pool, port, sums)
            for _ in range(0, count, _BLOCK):
                await _block(via, subject.port, through)
                await _block(direct, subject.engine_port, straight)
    figures: dict[str, float] = {}
    if through.first_byte_ns and straight.first_byte_ns:
        for name, share in (("p50", 0.50), ("p90", 0.90), ("p99", 0.99)):
            gateway = percentile(through.first_byte_ns, share) / 1e3
            engine = percentile(straight.first_byte_ns, share) / 1e3
            figures |= {f"{name}_us": gateway, f"engine_{name}_us": engine, f"added_{name}_us": gateway - engine}
    return noted(through, figures)


async def _block(pool: Pool, port: int, sums: AnswerCounts | None) -> None:
    await pool.refill()
    counted = await repeat(
        pool, chat_request(port, _SPEC), _SPEC, count=_BLOCK, timeout=TIMEOUT_SECS, pause=_PAUSE_SECS
    )
    if sums is not None:
        sums.merge(counted)


FIRST_BYTE = Case("ttfb", "first byte of a stream, one request at a time", "added_p99_us", _first_byte)


_BURST = 200
_BURST_SPEC = AnswerSpec(chunks=20, interval=0.02)
_IDLE_SECS = 4.0
"""Longer than cortex keeps idle connections to an engine that does not say how long it keeps them."""


async def _burst(subject: Subject) -> Measured:
    """Streams that all begin at once, on client connections that are open, each time after a pause. The first byte is
    counted from when its own request was sent. The first burst, before which the gateway has no connections to the
    engine, is not counted."""
    counted = AnswerCounts()
    with no_collections():
        async with Pool(subject.port, _BURST) as pool:
            for number in range(1 + subject.amount(10, 4)):
                await asyncio.sleep(_IDLE_SECS)
                await pool.refill()
                request = chat_request(subject.port, _BURST_SPEC)
                burst = await repeat(pool, request, _BURST_SPEC, count=_BURST, timeout=TIMEOUT_SECS)
                if number:
                    counted.merge(burst)
    times = counted.first_byte_ns
    figures = {} if not times else {f"p{share}_us": percentile(times, share / 100) / 1e3 for share in (50, 90, 99)}
    return noted(counted, figures)


BURST_200 = Case("burst200", "first byte of 200 streams that begin at once", "p99_us", _burst)
