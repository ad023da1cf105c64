"""Open, silent streams: memory for each, and whether thousands stay open without an error."""

from __future__ import annotations

import asyncio

from benchmarks.cases.case import Case, Measured, Subject, no_collections, noted
from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.load.drive import hold_open, repeat
from benchmarks.load.pool import Pool
from benchmarks.load.request import chat_request

STREAMS = 8000
_OPENED_PER_SECOND = 1000.0
_SETTLE_SECS = 1.0
_TIMEOUT_SECS = 60.0
_RELEASE = b"POST /bench/release HTTP/1.1\r\nhost: engine\r\ncontent-length: 0\r\n\r\n"


async def release(engine_port: int) -> None:
    """Lets the streams that the engine holds continue to their ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", engine_port)
    writer.write(_RELEASE)
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def _idle(subject: Subject) -> Measured:
    """The memory before is measured after 200 streams, so that what a process loads once is not counted."""
    count = subject.amount(STREAMS, STREAMS)
    warm = AnswerSpec(chunks=2, interval=0.001)
    async with Pool(subject.port, 8) as pool:
        await repeat(pool, chat_request(subject.port, warm), warm, count=200, timeout=_TIMEOUT_SECS)
    spec = AnswerSpec(chunks=3, interval=0.05, hold=True)
    before = subject.tree.rss_bytes()
    figures: dict[str, float] = {"streams": count}

    async def when_open() -> None:
        await asyncio.sleep(_SETTLE_SECS)
        grown = subject.tree.rss_bytes() - before
        figures["kib_per_stream"] = grown / 1024 / count
        figures["rss_mib"] = (grown + before) / (1 << 20)
        await release(subject.answering_port)

    with no_collections():
        counted = await hold_open(
            subject.port,
            chat_request(subject.port, spec),
            spec,
            count=count,
            per_second=_OPENED_PER_SECOND / subject.slowness,
            timeout=_TIMEOUT_SECS,
            when_open=when_open,
        )
    figures["ended_well"] = counted.answers
    return noted(counted, figures)


IDLE_8000 = Case("idle8000", f"{STREAMS} open, silent streams", "kib_per_stream", _idle, fresh=True)
