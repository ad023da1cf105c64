"""An engine's session with real processes: started, watched and stopped together."""

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
    """Starts a shell with `script`, and returns once that printed `up`."""
    output = tmp_path / "engine.log"
    process = await EngineProcess.start([SHELL, "-c", script], dict(os.environ), output)
    await until(lambda: "up" in output.read_text())
    return process


async def test_output_and_input(mark: str, tmp_path: Path) -> None:
    """Both outputs are appended to the file, the input is empty, and `wait` returns the exit code."""
    (tmp_path / "engine.log").write_text("before\n")
    process = await start(tmp_path, "echo up; echo wrong >&2; cat; exit 3")
    assert await process.wait() == 3
    assert (tmp_path / "engine.log").read_text() == "before\nup\nwrong\n"


async def test_it_leads_its_own_session(mark: str, tmp_path: Path) -> None:
    """Ctrl-C in neuron's terminal does not reach the engine."""
    process = await start(tmp_path, f"echo up; {SLEEP} 600")
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    await process.stop(5)


async def test_stop_sends_sigterm(mark: str, tmp_path: Path) -> None:
    """A process that ends on SIGTERM is not killed."""
    process = await start(tmp_path, f"trap 'exit 7' TERM; echo up; {SLEEP} 600 & wait")
    assert await process.stop(10) == 7


async def test_stop_kills_after_the_grace_period(mark: str, tmp_path: Path) -> None:
    """A process that ignores SIGTERM is killed with its helpers."""
    process = await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & echo up; {SLEEP} 600; wait")
    assert await process.stop(0.2) == -signal.SIGKILL
    assert not marked_processes(mark)


async def test_process_stopped_by_sigstop_is_killed(mark: str, tmp_path: Path) -> None:
    """It cannot handle SIGTERM, so it is killed after the grace period."""
    process = await start(tmp_path, f"echo up; {SLEEP} 600")
    os.kill(process.pid, signal.SIGSTOP)
    await until(
        lambda: [member.state for member in session.members(process.leader) if member.pid == process.pid] == ["T"]
    )
    assert await process.stop(0.2) == -signal.SIGKILL
    assert not marked_processes(mark)


async def test_helpers_are_killed_when_the_main_process_exits(mark: str, tmp_path: Path) -> None:
    """If the main process exits by itself, its helpers get no grace period, because they hold the memory."""
    process = await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & {SLEEP} 600 & echo up; exit 5")
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert await process.wait() == 5
    assert loop.time() - started < LINGER_SECS / 2
    assert not marked_processes(mark)


async def test_other_process_groups_of_the_session_are_killed(mark: str, tmp_path: Path) -> None:
    """A helper with its own process group is still in the session."""
    code = f"import os; os.setpgid(0, 0); print('up', flush=True); os.execv({SLEEP!r}, ['sleep', '600'])"
    process = await start(tmp_path, f'{sys.executable} -S -E -c "{code}" & wait')
    os.kill(process.pid, signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    assert not marked_processes(mark)


async def test_main_process_is_reaped_last(mark: str, tmp_path: Path) -> None:
    """Its pid, which identifies the session, stays taken until the session is empty, and no longer."""
    process = await start(tmp_path, f"{SLEEP} 600 & echo up; exit 0")
    await process.wait()
    assert process.pid in process.pids_seen
    assert len(process.pids_seen) > 1
    assert not [member for member in session.members(process.leader) if member.alive]
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)  # noqa: ASYNC222 - it does not block


async def test_cancelled_start_leaves_nothing(mark: str, tmp_path: Path) -> None:
    """No process is left, whenever the cancellation comes."""
    for steps in range(6):
        task = asyncio.create_task(
            EngineProcess.start([SLEEP, "600"], dict(os.environ), tmp_path / f"{steps}.log"), name="start"
        )
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).stop(5)  # the start was faster
    await until(lambda: not marked_processes(mark))


async def test_kill_now_needs_no_loop(mark: str, tmp_path: Path) -> None:
    """A forced exit needs this: when the call returns, all members have been sent SIGKILL."""
    process = await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & echo up; wait")
    process.kill_now()
    assert await process.wait() == -signal.SIGKILL
    assert not marked_processes(mark)


def test_closing_the_loop_kills_the_processes(mark: str, tmp_path: Path) -> None:
    """A loop that closes without a stop leaves no process."""

    async def careless() -> None:
        await start(tmp_path, f"trap '' TERM; {SLEEP} 600 & echo up; wait")

    asyncio.run(careless())
    asyncio.run(until(lambda: not marked_processes(mark)))
