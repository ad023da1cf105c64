"""Plain answers: CPU time for each at a concurrency of 32, and the most per second."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from pathlib import Path

from benchmarks.cases.case import TIMEOUT_SECS, Case, Measured, Subject, noted, spanned
from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.load.drive import repeat
from benchmarks.load.pool import Pool
from benchmarks.load.request import chat_request

CONCURRENCY = 32
SATURATING = 64
_PAUSE_SECS = 0.01
_WRK_SCRIPT = Path(__file__).with_name("post.lua")


async def _plain(subject: Subject) -> Measured:
    spec = AnswerSpec()
    request = chat_request(subject.port, spec)
    count = subject.amount(10_000, 6_000, at_least=64)
    connections = CONCURRENCY * subject.workers  # the same number for each worker as for a single one
    async with Pool(subject.port, connections) as pool:
        await repeat(pool, request, spec, count=max(connections, count // 5), timeout=TIMEOUT_SECS)
        await pool.refill()
        async with spanned(subject.tree) as span:
            counted = await repeat(pool, request, spec, count=count, timeout=TIMEOUT_SECS)
    figures = {
        "cpu_us": span.cpu_ns / 1e3 / count,
        "per_second": count / span.wall_secs,
        "busy_cpus": span.busy,
        "foreign": span.foreign,
    }
    return noted(counted, figures)


async def _paced(subject: Subject) -> Measured:
    spec = AnswerSpec()
    request = chat_request(subject.port, spec)
    count = subject.amount(16_000, 8_000, at_least=64) * subject.workers
    async with Pool(subject.port, CONCURRENCY * subject.workers) as pool:
        await repeat(pool, request, spec, count=count // 5, timeout=TIMEOUT_SECS)
        await pool.refill()
        async with spanned(subject.tree) as span:
            counted = await repeat(
                pool, request, spec, count=count, timeout=TIMEOUT_SECS, pause=_PAUSE_SECS, spread=_PAUSE_SECS
            )
    figures = {
        "cpu_us": span.cpu_ns / 1e3 / count,
        "per_second": count / span.wall_secs,
        "busy_cpus": span.busy,
        "foreign": span.foreign,
    }
    return noted(counted, figures)


async def _saturation(subject: Subject) -> Measured:
    secs = 2 if subject.quick else 4  # wrk counts whole seconds only
    wrk = shutil.which("wrk")
    if wrk is None or subject.slowness > 1:
        return await _saturated_without_wrk(subject, secs)
    await _wrk(wrk, subject.port, 1)
    async with spanned(subject.tree) as span:
        per_second, faults = await _wrk(wrk, subject.port, secs)
    figures = {
        "per_second": per_second,
        "busy_cpus": span.busy,
        "foreign": span.foreign,
        "cpu_us": span.cpu_ns / 1e3 / (per_second * secs),
    }
    measured = Measured(figures)
    if faults:
        measured.faults["wrk: not 200"] = faults
    return measured


async def _saturated_without_wrk(subject: Subject, secs: int) -> Measured:
    spec = AnswerSpec()
    request = chat_request(subject.port, spec)
    async with Pool(subject.port, SATURATING) as pool:
        began = time.perf_counter()
        probe = SATURATING * 2
        await repeat(pool, request, spec, count=probe, timeout=TIMEOUT_SECS)
        count = max(probe, int(probe / (time.perf_counter() - began) * secs))
        await pool.refill()
        async with spanned(subject.tree) as span:
            counted = await repeat(pool, request, spec, count=count, timeout=TIMEOUT_SECS)
    figures = {
        "per_second": count / span.wall_secs,
        "busy_cpus": span.busy,
        "foreign": span.foreign,
        "cpu_us": span.cpu_ns / 1e3 / count,
    }
    return noted(counted, figures)


async def _wrk(program: str, port: int, secs: int) -> tuple[float, int]:
    """Requests a second, and the number of failed answers. wrk inherits our CPUs."""
    request = chat_request(port, AnswerSpec())
    head, _, body = request.partition(b"\r\n\r\n")
    headers = [line.decode() for line in head.split(b"\r\n")[1:] if not line.lower().startswith(b"content-length")]
    command = [program, "-t1", f"-c{SATURATING}", f"-d{secs}s", "-s", str(_WRK_SCRIPT)]
    for header in headers:
        command += ["-H", header]
    process = await asyncio.create_subprocess_exec(
        *command, f"http://127.0.0.1:{port}/v1/chat/completions", "--", body, stdout=asyncio.subprocess.PIPE
    )
    output = (await process.communicate())[0].decode()
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", output)
    faults = int(failed[1]) if failed else 0
    faults += sum(map(int, errors.groups())) if errors else 0
    if rate is None:
        raise ConnectionError(f"wrk: {output.strip()[-200:] or 'no output'}")
    return float(rate[1]), faults


PLAIN = Case("plain", f"plain answers, {CONCURRENCY} at once", "cpu_us", _plain)
PACED = Case("paced", f"plain answers, {CONCURRENCY} clients for each worker, each pausing 10 ms", "cpu_us", _paced)
SATURATION = Case("saturation", f"plain answers, {SATURATING} at once, as many as possible", "per_second", _saturation)
