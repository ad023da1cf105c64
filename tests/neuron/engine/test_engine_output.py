"""An engine's output: follower, line ring, rotation, and what the logs endpoint streams."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from neuron.api.logs import last_lines, stream_lines
from neuron.engine import output as engine_output
from neuron.engine.log import MAX_READ, EngineLog, LogFollower
from neuron.engine.output import EngineOutput, LineRing
from neuron.harness.vllm.phases import VllmLoadReading
from neuron.progress.progress import LoadProgress
from tests.neuron.sim_process import until

BAR = "Loading safetensors checkpoint shards:  {}% Completed | {}/4 [00:00<00:00,  4.02it/s]"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def numbered(start: int, stop: int) -> list[str]:
    return [f"line {number:06}" for number in range(start, stop)]


def encoded(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def bytes_in(directory: Path) -> int:
    return sum(entry.stat().st_size for entry in directory.iterdir())


@contextlib.asynccontextmanager
async def following(output: EngineOutput, *, pause_secs: float = 0.01) -> AsyncIterator[list[str]]:
    """The lines published while the body runs."""
    published: list[str] = []
    task = asyncio.create_task(output.follow(published.extend, lambda: pause_secs))
    try:
        yield published
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_what_a_loading_engine_writes_is_read_at_once(tmp_path: Path) -> None:
    """A load ends when the engine says so, not at the next look; once it is loaded its many lines wait for that."""
    path = tmp_path / "engine.log"
    path.touch()
    output, loading, lines = EngineOutput(path), True, asyncio.Queue[str]()

    def on_lines(new: list[str]) -> None:
        for line in new:
            lines.put_nowait(line)

    task = asyncio.create_task(output.follow(on_lines, lambda: 60.0, at_once=lambda: loading))
    with path.open("a", buffering=1) as file:
        for number in range(3):
            print(f"line {number}", file=file)
            assert await asyncio.wait_for(lines.get(), 5) == f"line {number}"
        loading = False
        print("it serves", file=file)
        assert await asyncio.wait_for(lines.get(), 5) == "it serves"
        print("a request", file=file)
        await asyncio.sleep(0.2)
        assert lines.empty()
    await output.close()
    await asyncio.wait_for(task, 5)
    assert lines.get_nowait() == "a request"


async def test_output_is_read_without_inotify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limits are small on some hosts: then the pause decides."""

    def refused(path: Path) -> int:
        raise OSError("too many watches")

    monkeypatch.setattr("neuron.engine.file_watch._watch", refused)
    path = tmp_path / "engine.log"
    path.touch()
    output, lines = EngineOutput(path), asyncio.Queue[list[str]]()
    task = asyncio.create_task(
        output.follow(lambda new: lines.put_nowait(new) if new else None, lambda: 0.01, at_once=lambda: True)
    )
    with path.open("a", buffering=1) as file:
        print("line", file=file)
    assert await asyncio.wait_for(lines.get(), 5) == ["line"]
    await output.close()
    await asyncio.wait_for(task, 5)


async def test_watches_leave_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.touch()
    before = names_in(Path("/proc/self/fd"))
    for _ in range(20):
        output = EngineOutput(path)
        task = asyncio.create_task(output.follow(lambda _: None, lambda: 60.0, at_once=lambda: True))
        await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert names_in(Path("/proc/self/fd")) == before


# --- the ring


def test_ring_is_bounded() -> None:
    """Lines and characters are limited; one longer line is kept alone."""
    ring = LineRing(max_lines=3, max_chars=10)
    ring.extend(["a", "b", "c"])
    assert (ring.tail(2), ring.dropped) == (["b", "c"], False)
    ring.extend(["d"])
    assert (ring.tail(9), ring.dropped) == (["b", "c", "d"], True)
    ring.extend(["12345678"])
    assert ring.tail(9) == ["c", "d", "12345678"]
    ring.extend(["x" * 50])
    assert ring.tail(9) == ["x" * 50]
    assert ring.tail(0) == []


# --- the follower


def test_a_progress_bar_is_published_when_it_is_drawn(tmp_path: Path) -> None:
    """The bar is published once, and not only when its next state ends the line a minute later."""
    path = tmp_path / "engine.log"
    follower = LogFollower(EngineLog(path))
    append(path, b"\r" + BAR.format(25, 1).encode())
    assert follower.new_lines() == [BAR.format(25, 1)]
    assert follower.new_lines() == []
    append(path, b"\r" + BAR.format(50, 2).encode())
    assert follower.new_lines() == [BAR.format(50, 2)]
    append(path, b"\nnext\nhalf a li")
    assert follower.new_lines() == ["next"]
    assert follower.rest() == ["half a li"]
    assert follower.rest() == []


def test_output_of_an_adopted_engine_is_read_from_its_end(tmp_path: Path) -> None:
    """Only the end of a large file is read."""
    path = tmp_path / "engine.log"
    path.write_bytes(encoded(numbered(0, 200_000)))
    follower = LogFollower(EngineLog(path))
    lines = follower.new_lines()
    assert lines[-1] == "line 199999"
    assert len(lines) <= MAX_READ // 12 + 1
    assert not follower.behind
    assert not follower.from_start


# --- rotation


def test_rotation_keeps_every_line(tmp_path: Path) -> None:
    """The follower and the tail of the files lose none, not even a line that was half written at the rotation."""
    path = tmp_path / "engine.log"
    log = EngineLog(path)
    follower = LogFollower(log)
    assert follower.new_lines() == []
    lines = numbered(0, 1000)
    with path.open("ab", buffering=0) as writer:
        writer.write(encoded(lines) + b"half")
        assert log.trim(max_bytes=1000, follower=follower)
        writer.write(b" and half\nafter\n")
    assert follower.new_lines() == [*lines, "half and half", "after"]
    assert path.read_bytes() == b" and half\nafter\n"
    assert log.previous.stat().st_size <= 1000
    assert log.previous.stat().st_mode & 0o777 == 0o600
    assert log.tail(4) == ["line 000998", "line 000999", "half and half", "after"]
    assert names_in(tmp_path) == ["engine.log", "engine.log.1"]


WRITER = """
import os, sys, time
out = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for number in range(int(sys.argv[2])):
    os.write(out, b"line %06d\\n" % number)
    if number % 200 == 0:
        time.sleep(0.001)
"""


async def test_rotation_under_a_writing_process(tmp_path: Path) -> None:
    """A process appends in bursts while its file is rotated repeatedly: each line is read once and in order, except a
    few at the moments of truncation, and the files stay below the limit."""
    path = tmp_path / "engine.log"
    path.touch()
    output = EngineOutput(path, max_file_bytes=200_000)
    count = 60_000
    async with following(output) as published:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, str(path), str(count))
        assert await process.wait() == 0
        await output.close()
    rotations = EngineLog(path).previous.exists()
    assert rotations
    numbers = [int(line.split()[1]) for line in published if line.startswith("line ") and len(line) == 11]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == count - 1
    assert len(numbers) >= count * 0.9
    assert bytes_in(tmp_path) < 2 * 200_000 + 2 * MAX_READ
    assert output.file.tail(5) == numbered(count - 5, count)


def test_rotation_on_a_full_disk_keeps_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy fails: the last lines are kept in the space that the truncation frees, and the follower misses
    nothing."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "engine.log"
    path.write_bytes(encoded(numbered(0, 100)))
    follower = LogFollower(EngineLog(path))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        assert EngineLog(path).trim(max_bytes=100, follower=follower)
    assert follower.new_lines() == numbered(0, 100)
    assert path.stat().st_size == 0
    assert EngineLog(path).tail(2) == ["line 000098", "line 000099"]
    assert names_in(tmp_path) == ["engine.log", "engine.log.1"]


def test_a_file_that_cannot_be_rotated_is_unchanged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The failure is logged and returned."""
    path = tmp_path / "engine.log"
    path.write_bytes(encoded(numbered(0, 100)))
    (tmp_path / "engine.log.1").mkdir()
    (tmp_path / "engine.log.1" / "in the way").touch()
    assert not EngineLog(path).trim(max_bytes=100)
    assert "cannot be trimmed" in caplog.text
    assert path.stat().st_size == 1200


# --- all of it together


async def test_tail_comes_from_memory(tmp_path: Path) -> None:
    """If memory has enough lines, or all, the file is not read again; the newest lines are included."""
    path = tmp_path / "engine.log"
    output = EngineOutput(path)
    assert await output.tail(5) == []
    path.write_bytes(encoded(numbered(0, 10)))
    assert await output.tail(3) == numbered(7, 10)
    append(path, b"half a li")
    assert await output.tail(2) == ["line 000009", "half a li"]
    path.unlink()
    assert await output.tail(100) == [*numbered(0, 10), "half a li"]


async def test_tail_of_an_adopted_engine_reads_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns more lines than memory holds, some from before the rotation."""
    monkeypatch.setattr(engine_output, "RING_LINES", 10)
    (tmp_path / "engine.log.1").write_bytes(encoded(numbered(0, 100)))
    path = tmp_path / "engine.log"
    path.write_bytes(encoded(numbered(100, 105)))
    output = EngineOutput(path)
    assert await output.tail(2) == numbered(103, 105)
    assert await output.tail(50) == numbered(55, 105)
    path.write_bytes(encoded(numbered(100, 200)))
    assert await output.tail(50) == numbered(150, 200)


async def test_an_unreadable_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The lines in memory stay available and the follower continues."""
    path = tmp_path / "engine.log"
    path.write_bytes(encoded(numbered(0, 5)))
    output = EngineOutput(path)
    assert await output.tail(2) == numbered(3, 5)
    path.unlink()
    path.mkdir()
    assert await output.tail(2) == numbered(3, 5)
    assert await output.tail(2) == numbered(3, 5)
    assert caplog.text.count("cannot be read") == 1


async def test_a_cancelled_caller_loses_no_lines(tmp_path: Path) -> None:
    """The read continues after the caller is cancelled."""
    path = tmp_path / "engine.log"
    path.write_bytes(encoded(numbered(0, 1000)))
    output = EngineOutput(path)
    asking = asyncio.create_task(output.tail(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    async with following(output) as published:
        append(path, b"last\n")
        await until(lambda: "last" in published)
    assert await output.tail(1001) == [*numbered(0, 1000), "last"]


async def test_the_last_output_is_kept(tmp_path: Path) -> None:
    """A last line without a line end is kept too; `follow` ends by itself."""
    path = tmp_path / "engine.log"
    output = EngineOutput(path)
    published: list[str] = []
    task = asyncio.create_task(output.follow(published.extend, lambda: 60.0))
    append(path, b"one\nBus error")
    await output.close()
    await asyncio.wait_for(task, 5)
    assert published == ["one", "Bus error"]
    assert await output.tail(5) == ["one", "Bus error"]


async def test_a_simulated_engine_passes_all_phases(tmp_path: Path) -> None:
    """The log file's lines lead to every phase in order, with a download if configured."""
    path = tmp_path / "engine.log"
    output = EngineOutput(path)
    loop = asyncio.get_running_loop()
    progress = LoadProgress(VllmLoadReading(), started=loop.time())
    phases: list[str] = []
    up = asyncio.Event()

    def on_lines(lines: list[str]) -> None:
        for line in lines or [""]:
            if progress.feed([line], loop.time()):
                phases.append(progress.view(loop.time()).phase)
        if progress.serving:
            up.set()

    with path.open("ab") as sink:
        command = [sys.executable, "-m", "neuron.sim", "serve", "m", "--port", "0", "--load-secs", "0.3"]
        process = await asyncio.create_subprocess_exec(
            *command, "--download-secs", "0.2", stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    follower = asyncio.create_task(output.follow(on_lines, lambda: 0.01))
    try:
        await asyncio.wait_for(up.wait(), 20)
    finally:
        process.terminate()
        assert await process.wait() == 0
        await output.close()
        await follower
    seen = list(dict.fromkeys(["starting", *phases]))
    assert seen == ["starting", "downloading", "loading weights", "compiling", "capturing graphs", "warming up"]
    assert progress.times(loop.time()).phases["downloading"] > 0.1


# --- the endpoint


@contextlib.asynccontextmanager
async def serving_logs(
    outputs: Mapping[str, EngineOutput], closing: asyncio.Event
) -> AsyncIterator[aiohttp.ClientSession]:
    async def logs(request: web.Request) -> web.StreamResponse:
        if "follow" in request.query:
            return await stream_lines(request, lambda: outputs, int(request.query["tail"]), closing)
        return await last_lines("m", outputs, int(request.query["tail"]))

    app = web.Application()
    app.router.add_get("/logs", logs)
    async with TestServer(app) as server, aiohttp.ClientSession(str(server.make_url("/"))) as session:
        yield session


async def read_events(response: aiohttp.ClientResponse, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        line = (await asyncio.wait_for(response.content.readline(), 5)).decode()
        if line.startswith("data: "):
            found.append(line.removeprefix("data: ").rstrip("\n"))
    return found


@pytest.mark.parametrize("ends", ["engine", "neuron"])
async def test_logs_can_be_followed(tmp_path: Path, ends: str) -> None:
    """The last lines, then each new one, even without another follower. The response ends with the engine or the
    client."""
    path = tmp_path / "engine.log"
    path.write_bytes(encoded(numbered(0, 10)))
    output, closing = EngineOutput(path), asyncio.Event()
    async with serving_logs({"": output}, closing) as session:
        async with session.get("/logs?tail=2&follow=true") as response:
            assert response.content_type == "text/event-stream"
            assert await read_events(response, 2) == numbered(8, 10)
            append(path, encoded(["more", "and more"]))
            assert await read_events(response, 2) == ["more", "and more"]
            append(path, b"last words")
            if ends == "engine":
                await output.close()
                assert await read_events(response, 1) == ["last words"]
            else:
                closing.set()
            rest = await asyncio.wait_for(response.content.read(), 5)
            assert rest.replace(b"data: last words\n\n", b"") == b"\n"
        async with session.get("/logs?tail=2") as answer:
            assert (await answer.json())["id"] == "m"


async def test_logs_without_an_engine(tmp_path: Path) -> None:
    """The answer has no lines, and a stream ends immediately."""
    async with serving_logs({}, asyncio.Event()) as session:
        async with session.get("/logs?tail=2") as answer:
            assert await answer.json() == {"id": "m", "lines": []}
        async with session.get("/logs?tail=2&follow=true") as response:
            assert await response.read() == b""


async def test_logs_of_several_engines(tmp_path: Path) -> None:
    """Each line begins with its engine's name; a stream goes on until the last engine is gone."""
    paths = [tmp_path / "0.log", tmp_path / "1.log"]
    for path in paths:
        path.write_bytes(encoded([f"of {path.stem}", "old"]))
    outputs = {f"[{path.stem}] ": EngineOutput(path) for path in paths}
    async with serving_logs(outputs, asyncio.Event()) as session:
        async with session.get("/logs?tail=2") as answer:
            assert (await answer.json())["lines"] == ["[0] of 0", "[0] old", "[1] of 1", "[1] old"]
        async with session.get("/logs?tail=1&follow=true") as response:
            assert sorted(await read_events(response, 2)) == ["[0] old", "[1] old"]
            append(paths[1], encoded(["new"]))
            assert await read_events(response, 1) == ["[1] new"]
            await outputs["[1] "].close()
            append(paths[0], encoded(["still here"]))
            assert await read_events(response, 1) == ["[0] still here"]
            await outputs["[0] "].close()
            assert await asyncio.wait_for(response.content.read(), 5) == b"\n"
