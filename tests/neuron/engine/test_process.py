"""An engine's session: started, watched, ended as a whole. With real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from neuron.engine import session
from neuron.engine.process import LINGER_SECS, EngineProcess
from tests.neuron.neurons import marked_processes, until

SLEEP = shutil.which("sleep") or "sleep"
SHELL = shutil.which("sh") or "sh"


async def start(tmp_path: Path, script: str) -> EngineProcess:
    """A shell that runs `script`, which prints `up` when it is where the test wants it; returns then."""
    output = tmp_path / "engine.log"
    process = await EngineProcess.start([SHELL, "-c", script], dict(os.environ), output)
    await until(lambda: "up" in output.read_text())
    return process


async def test_output_and_input(mark: str, tmp_path: Path) -> None:
    """Both outputs go to the file, appended; input is empty; the exit code comes back."""
    (tmp_path / "engine.log").write_text("before\n")
    process = await start(tmp_path, "echo up; echo wrong >&2; cat; exit 3")
    assert await process.wait() == 3
    assert (tmp_path / "engine.log").read_text() == "before\nup\nwrong\n"


async def test_session_of_its_own(mark: str, tmp_path: Path) -> None:
    """A Ctrl-C in neuron's terminal goes to neuron's group; the engine is in another."""
    process = await start(tmp_path, f"echo up; {SLEEP} 600")
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    await process.stop(5)


async def test_stop_gives_the_signal(mark: str, tmp_path: Path) -> None:
    """A process that ends on SIGTERM is not killed."""
    process = await start(tmp_path, f"trap 'exit 7' TERM; echo up; {SLEEP} 600 & wait")
    assert await process.stop(10) == 7


async def test_stop_kills_after_the_grace(mark: str, tmp_path: Path) -> None:
    """One that ignores it is killed with everything it started."""
    process = await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & echo up; {SLEEP} 600; wait")
    assert await process.stop(0.2) == -signal.SIGKILL
    assert not marked_processes(mark)


async def test_stopped_process_is_ended_too(mark: str, tmp_path: Path) -> None:
    """SIGSTOP does not protect from the end."""
    process = await start(tmp_path, f"echo up; {SLEEP} 600")
    os.kill(process.pid, signal.SIGSTOP)
    await until(
        lambda: [member.state for member in session.members(process.leader) if member.pid == process.pid] == ["T"]
    )
    assert await process.stop(0.2) == -signal.SIGKILL
    assert not marked_processes(mark)


async def test_rest_of_the_session_is_swept_at_once(mark: str, tmp_path: Path) -> None:
    """When the main process ends by itself, its helpers go without a grace: they hold the memory."""
    process = await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & {SLEEP} 600 & echo up; exit 5")
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert await process.wait() == 5
    assert loop.time() - started < LINGER_SECS / 2
    assert not marked_processes(mark)


async def test_other_process_groups_of_the_session_are_swept(mark: str, tmp_path: Path) -> None:
    """A helper that made a process group of its own is still in the session."""
    code = f"import os; os.setpgid(0, 0); print('up', flush=True); os.execv({SLEEP!r}, ['sleep', '600'])"
    process = await start(tmp_path, f'{sys.executable} -S -E -c "{code}" & wait')
    os.kill(process.pid, signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    assert not marked_processes(mark)


async def test_main_process_is_reaped_last(mark: str, tmp_path: Path) -> None:
    """Its number, by which the session is known, stays taken until the session is empty, and not longer."""
    process = await start(tmp_path, f"{SLEEP} 600 & echo up; exit 0")
    await process.wait()
    assert process.pid in process.pids_seen
    assert len(process.pids_seen) > 1
    assert not [member for member in session.members(process.leader) if member.alive]
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)  # noqa: ASYNC222 - it does not block


async def test_cancelled_start_leaves_nothing(mark: str, tmp_path: Path) -> None:
    """However early or late the cancellation comes, no process is left."""
    for turns in range(6):
        task = asyncio.create_task(
            EngineProcess.start([SLEEP, "600"], dict(os.environ), tmp_path / f"{turns}.log"), name="start"
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).stop(5)  # it was quicker
    await until(lambda: not marked_processes(mark))


async def test_kill_now_needs_no_loop(mark: str, tmp_path: Path) -> None:
    """For the forced exit: everything has got SIGKILL when the call returns."""
    process = await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & echo up; wait")
    process.kill_now()
    assert await process.wait() == -signal.SIGKILL
    assert not marked_processes(mark)


def test_end_of_the_loop_ends_the_processes(mark: str, tmp_path: Path) -> None:
    """A loop that is torn down without a stop leaves nothing behind either."""

    async def careless() -> None:
        await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & echo up; wait")

    asyncio.run(careless())
    asyncio.run(until(lambda: not marked_processes(mark)))
