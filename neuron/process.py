"""One engine's processes: the one that was started and all it started in turn, as one thing that begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from neuron import session
from shared.tasks import timeout

log = logging.getLogger(__name__)

LINGER_SECS = 2.0
"""How long helpers may outlive a main process that ended as asked, before they are killed: they clean up /dev/shm."""
_SCAN_SECS = (0.01, 0.1)  # first and longest pause between two looks at a session that is being emptied
_STUCK_SECS = 10.0


class EngineProcess:
    """A process in a session of its own, watched until nothing of the session is left.

    One task (`_watch`) sees the end of the main process, empties the session and reaps; everything else only sends
    signals and waits for it. The main process stays a zombie until its session is empty, so that its number, by which
    the session is known, cannot be somebody else's by then.
    """

    def __init__(self, child: subprocess.Popen[bytes], pidfd: int) -> None:
        self.pid = child.pid
        self.pids_seen: set[int] = {child.pid}
        """Every pid known to have been of this engine, also after its end: what memory must be free of."""
        self.main_exited = asyncio.Event()
        self._child = child
        self._pidfd = pidfd
        self._asked_to_stop = False
        self._killed = False
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit)
        self._end = asyncio.create_task(self._watch(), name=f"engine process {self.pid}")

    @classmethod
    async def start(cls, argv: Sequence[str], env: Mapping[str, str], output: Path) -> EngineProcess:
        """Starts `argv` with exactly `env`; standard output and error are appended to `output`.

        A cancellation that comes while the process is being started kills it before it takes effect.

        Raises:
            OSError: it cannot be started.
        """
        # In a thread: a fork waits until the new program is read, which may come from a network disk.
        starting = asyncio.get_running_loop().run_in_executor(None, _start, argv, env, output)
        cancelled: asyncio.CancelledError | None = None
        while not starting.done():
            try:
                await asyncio.wait([starting])
            except asyncio.CancelledError as error:
                cancelled = error
        process = cls(*starting.result())
        if cancelled is not None:
            process.kill_now()
            raise cancelled
        return process

    async def wait(self) -> int:
        """The exit code of the main process (negative: the signal that ended it), once the whole session is gone."""
        return await asyncio.shield(self._end)

    async def stop(self, grace_secs: float) -> int:
        """SIGTERM to the main process; what is there after `grace_secs` gets SIGKILL. Returns as `wait`."""
        if not self.main_exited.is_set() and not self._asked_to_stop:
            self._asked_to_stop = True
            self._signal(signal.SIGTERM)
        try:
            async with timeout(grace_secs):
                await self.main_exited.wait()
        except asyncio.TimeoutError:
            log.warning("engine process %d is still there %g s after SIGTERM: killing it", self.pid, grace_secs)
            self._killed = True
            self._signal(signal.SIGKILL)  # the rest of the session follows as soon as it is gone
        return await self.wait()

    def kill_now(self) -> None:
        """SIGKILL to the whole session, before the next line of the caller runs. `wait` tells when it is gone.

        Blocks for some milliseconds: for an exit that waits for nothing.
        """
        self._killed = True
        if not self._end.done():
            self.pids_seen |= session.kill_members(self.pid)

    def _signal(self, number: int) -> None:
        """To the main process, which the descriptor stands for: its number may be another's by now."""
        if not self._end.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self.main_exited.set()

    async def _watch(self) -> int:
        try:
            await self.main_exited.wait()
            if self._asked_to_stop and not self._killed:
                await self._linger()
            await self._empty_session()
        except BaseException:  # the loop is being torn down: nothing may survive it
            session.kill_members(self.pid)
            raise
        finally:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._child.wait()
        return self._child.returncode

    async def _linger(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LINGER_SECS
        while True:  # nothing tells when a process ends that is not our child
            if self._killed or loop.time() >= deadline or not await self._live_members():
                return
            await asyncio.sleep(_SCAN_SECS[1] / 2)

    async def _live_members(self) -> set[int]:
        found = {p.pid for p in await asyncio.to_thread(session.members, self.pid) if p.alive}
        self.pids_seen |= found
        return found

    async def _empty_session(self) -> None:
        pause, waited, told = _SCAN_SECS[0], 0.0, 0.0
        while alive := await asyncio.to_thread(session.kill_members, self.pid):
            self.pids_seen |= alive
            await asyncio.sleep(pause)
            waited += pause
            pause = min(pause * 2, _SCAN_SECS[1])
            if waited - told >= _STUCK_SECS:
                told = waited
                log.warning("processes %s of engine %d survive SIGKILL since %.0f s", sorted(alive), self.pid, waited)
        await asyncio.to_thread(session.reap_orphans, self.pid)


def _start(argv: Sequence[str], env: Mapping[str, str], output: Path) -> tuple[subprocess.Popen[bytes], int]:
    # A file and not a pipe: an engine may outlive this neuron, and must not die of a broken pipe then.
    with output.open("ab") as sink:
        child = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return child, os.pidfd_open(child.pid)
    except BaseException:
        session.kill_members(child.pid)
        child.wait()
        raise
