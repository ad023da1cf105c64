"""Streams: CPU time for each relayed token event."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from benchmarks.cases.case import TIMEOUT_SECS, Case, Measured, Subject, noted, spanned
from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.load.drive import repeat
from benchmarks.load.pool import Pool
from benchmarks.load.request import chat_request

_SPREAD = 20
"""The streams start spread over this many intervals."""


def streaming(streams: int, interval: float) -> Callable[[Subject], Awaitable[Measured]]:
    """This many streams at once, `interval` seconds between the chunks of each."""

    async def measure(subject: Subject) -> Measured:
        chunks = subject.amount(100, 100, at_least=50)  # with fewer, the requests themselves would dominate
        spec = AnswerSpec(chunks=chunks, interval=interval)
        request = chat_request(subject.port, spec)
        # All at once, so that every contender has a connection to the engine for each stream. Otherwise only contenders
        # that keep idle connections for minutes would have them, from the previous round.
        warm = AnswerSpec(chunks=2, interval=interval * (_SPREAD + 5))
        async with Pool(subject.port, streams) as pool:
            await repeat(
                pool,
                chat_request(subject.port, warm),
                warm,
                count=streams,
                timeout=TIMEOUT_SECS,
                spread=interval * _SPREAD,
            )
            await pool.refill()
            async with spanned(subject.tree) as span:
                counted = await repeat(
                    pool, request, spec, count=streams, timeout=TIMEOUT_SECS, spread=interval * _SPREAD
                )
        ideal = interval * (chunks - 1 + _SPREAD)
        figures = {
            "cpu_us": span.cpu_ns / 1e3 / (streams * chunks),
            "peak_rss_mib": span.peak_rss_bytes / (1 << 20),
            "behind_secs": max(0.0, span.wall_secs - ideal),
            "reads_per_chunk": counted.pieces / max(1, counted.answers) / chunks,
            "busy_cpus": span.busy,
            "foreign": span.foreign,
        }
        return noted(counted, figures)

    return measure


STREAM_200 = Case("stream200", "200 streams, a chunk each 20 ms", "cpu_us", streaming(200, 0.02))
STREAM_1000 = Case("stream1000", "1000 streams, a chunk each 50 ms", "cpu_us", streaming(1000, 0.05))
