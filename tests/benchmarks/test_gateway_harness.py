"""The gateway benchmark, on a small scale: what it counts and what it catches. No times are asserted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.cases.case import Subject
from benchmarks.cases.first_byte import FIRST_BYTE, percentile
from benchmarks.cases.idle import release
from benchmarks.cases.streams import streaming
from benchmarks.contenders.aiohttp_proxy import AIOHTTP
from benchmarks.contenders.process import Runner, Running, end, free_port, start
from benchmarks.engine.answer_spec import AnswerSpec, spec_in
from benchmarks.engine.answers import stream_events, stream_payload
from benchmarks.load.check import fault
from benchmarks.load.connection import Answer, BadAnswer, unchunked
from benchmarks.load.drive import hold_open, repeat
from benchmarks.load.pool import Pool
from benchmarks.load.request import PROMPT_BYTES, chat_request, prompt_text
from benchmarks.measure.tree import ProcessTree
from benchmarks.runner import listens, split_cpus


@pytest.fixture
async def engine_port(tmp_path: Path) -> AsyncIterator[int]:
    port = free_port()
    engine = start(
        [sys.executable, "-m", "benchmarks.engine", str(port)], tmp_path / "engine.log", cpus=split_cpus().load
    )
    try:
        await listens(port)
        yield port
    finally:
        end(engine)


@pytest.fixture
async def proxy(engine_port: int, tmp_path: Path) -> AsyncIterator[Running]:
    cpus = split_cpus()
    runner = Runner(AIOHTTP, engine_port, tmp_path / "contenders", cpus.gateway, cpus.load)
    try:
        yield await runner.started()
    finally:
        runner.stop()


async def test_every_plain_answer_is_counted_and_compared(proxy: Running) -> None:
    spec = AnswerSpec()
    async with Pool(proxy.port, 8) as pool:
        counted = await repeat(pool, chat_request(proxy.port, spec), spec, count=200, timeout=20)
    assert (counted.answers, counted.unchanged, counted.failed) == (200, 200, 0)
    assert len(counted.first_byte_ns) == 200
    assert proxy.tree.cpu_ns() > 0


async def test_large_bodies_pass_both_ways(proxy: Running) -> None:
    spec = AnswerSpec(size=1_000_000)
    async with Pool(proxy.port, 2) as pool:
        request = chat_request(proxy.port, spec, image_bytes=2_000_000)
        counted = await repeat(pool, request, spec, count=4, timeout=20)
    assert len(request) > 2_000_000
    assert (counted.answers, counted.unchanged, counted.failed) == (4, 4, 0)
    assert counted.body_bytes > 4_000_000


async def test_a_case_measures_streams_and_finds_them_whole(proxy: Running, engine_port: int) -> None:
    subject = Subject(proxy.port, engine_port, engine_port, proxy.tree, quick=True)
    measured = await streaming(20, 0.005)(subject)
    assert not measured.faults
    assert not measured.notes
    assert measured.figures["cpu_us"] > 0


async def test_the_first_byte_is_compared_with_the_engine_alone(proxy: Running, engine_port: int) -> None:
    subject = Subject(proxy.port, engine_port, engine_port, proxy.tree, slowness=6, quick=True)
    measured = await FIRST_BYTE.measure(subject)
    assert not measured.faults
    assert measured.figures["p50_us"] == pytest.approx(
        measured.figures["engine_p50_us"] + measured.figures["added_p50_us"]
    )


async def test_silent_streams_stay_open_until_they_are_released(proxy: Running, engine_port: int) -> None:
    spec = AnswerSpec(chunks=3, interval=0.002, hold=True)
    opened = []

    async def when_open() -> None:
        opened.append(True)
        await release(engine_port)

    counted = await hold_open(
        proxy.port, chat_request(proxy.port, spec), spec, count=30, per_second=1000, timeout=20, when_open=when_open
    )
    assert opened == [True]
    assert (counted.answers, counted.failed) == (30, 0)


async def test_a_dead_gateway_is_a_fault_and_not_a_hang(tmp_path: Path) -> None:
    spec = AnswerSpec(chunks=2, hold=True)
    port = free_port()

    async def nothing_to_do() -> None:
        return

    counted = await hold_open(
        port, chat_request(port, spec), spec, count=3, per_second=1000, timeout=5, when_open=nothing_to_do
    )
    assert counted.failed == 3


def _answer(body: bytes) -> Answer:
    return Answer(200, body, 1, 2, 1)


def test_lost_doubled_and_misplaced_tokens_are_caught() -> None:
    spec = AnswerSpec(chunks=3)
    whole = stream_payload(3)
    events = whole.split(b"\n\n")
    assert fault(_answer(whole), spec) is None
    assert fault(_answer(whole.replace(b'"object":', b'"object": ')), spec) is None  # reformatted, complete
    assert fault(_answer(b"\n\n".join(events[:2] + events[3:])), spec) == "2 tokens in order, not 3"
    assert fault(_answer(b"\n\n".join([*events[:2], events[1], *events[2:]])), spec) is not None
    assert fault(_answer(b"\n\n".join([events[0], events[2], events[1], *events[3:]])), spec) is not None
    assert fault(_answer(b"\n\n".join(events[:-2])), spec) == "no [DONE] at the end"
    assert fault(None, spec) is not None


def test_broken_framing_is_caught() -> None:
    framed = b"".join(stream_events(3))
    assert unchunked(framed) == stream_payload(3)
    for broken in (framed[:-3], framed[:100] + framed[101:], framed + b"x"):
        with pytest.raises(BadAnswer):
            unchunked(broken)


def test_an_answer_spec_survives_a_prompt() -> None:
    spec = AnswerSpec(chunks=7, interval=0.25, size=3, hold=True)
    text = prompt_text(spec)
    assert len(text) == PROMPT_BYTES
    assert spec_in(text.encode()) == spec


async def test_the_time_of_threads_that_have_ended_is_kept() -> None:
    work = "import time, threading\n"
    work += "def burn():\n    while time.thread_time() < 0.8: pass\n"
    work += "thread = threading.Thread(target=burn); thread.start(); thread.join()\n"
    work += "print('done', flush=True); input()"
    child = subprocess.Popen(  # noqa: ASYNC220  # starting one takes no time that matters here
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    tree = ProcessTree(child.pid)
    try:
        async with tree.watched():
            # In a thread, so that the tree is read meanwhile.
            assert await asyncio.to_thread(child.stdout.readline) == b"done\n"
        assert tree.cpu_ns() > 400_000_000
        assert tree.peak_rss_bytes() >= tree.rss_bytes() > 0
    finally:
        child.communicate(b"\n", timeout=10)


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([5, 1, 3], 0.5) == 3
    assert percentile(list(range(100)), 0.99) == 99
