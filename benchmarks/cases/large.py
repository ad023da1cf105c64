"""Large bodies: prompts of 10 MB, answers of 1 MB."""

from __future__ import annotations

from benchmarks.cases.case import TIMEOUT_SECS, Case, Measured, Subject, noted, spanned
from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.load.drive import repeat
from benchmarks.load.pool import Pool
from benchmarks.load.request import chat_request

PROMPT_BYTES = 10_000_000
ANSWER_BYTES = 1_000_000


async def _many(subject: Subject, request: bytes, spec: AnswerSpec, *, count: int, concurrency: int) -> Measured:
    async with Pool(subject.port, concurrency) as pool:
        rss = subject.tree.rss_bytes()
        await repeat(pool, request, spec, count=concurrency, timeout=TIMEOUT_SECS)
        await pool.refill()
        async with spanned(subject.tree) as span:
            counted = await repeat(pool, request, spec, count=count, timeout=TIMEOUT_SECS)
    figures = {
        "cpu_ms": span.cpu_ns / 1e6 / count,
        "grown_mib": (span.peak_rss_bytes - rss) / (1 << 20),
        "per_second": count / span.wall_secs,
        "foreign": span.foreign,
    }
    return noted(counted, figures)


async def _prompts(subject: Subject) -> Measured:
    request = chat_request(subject.port, AnswerSpec(), image_bytes=PROMPT_BYTES)
    return await _many(subject, request, AnswerSpec(), count=subject.amount(40, 12, at_least=4), concurrency=4)


async def _answers(subject: Subject) -> Measured:
    spec = AnswerSpec(size=ANSWER_BYTES)
    request = chat_request(subject.port, spec)
    return await _many(subject, request, spec, count=subject.amount(400, 120, at_least=16), concurrency=8)


PROMPT_10M = Case("prompt10m", "prompts of 10 MB, 4 at once", "cpu_ms", _prompts, fresh=True)
ANSWER_1M = Case("answer1m", "answers of 1 MB, 8 at once", "cpu_ms", _answers)
