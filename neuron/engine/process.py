"""One engine's processes: started, watched and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from neuron.engine import session
from neuron.engine.session import Leader
from neuron.harness.base import ENGINE_ID_VARIABLE
from shared.system.process_stat import stat_of
from shared.tasks import timeout

log = logging.getLogger(__name__)

LINGER_SECS = 2.0
"""How long helpers may outlive a main process that stopped on request, before they are killed: they clean up
/dev/shm."""
_SCAN_SECS = (0.01, 0.1)  # first and longest pause between two scans for members
_STUCK_SECS = 10.0


class EngineProcess:
    """A process in its own session, watched until all its members are gone.

    One task (`_watch`) waits for the main process to exit, kills the remaining members and reaps; all other methods
    only send signals and wait for that task. A main process that is our child stays a zombie until its members are
    gone, so that its pid, which identifies the session, is not reused before. For an adopted one see
    `neuron.engine.session`.
    """

    def __init__(self, leader: Leader, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.leader = leader
        self.pids_seen: set[int] = {leader.pid}
        """Every pid that the engine was seen with, kept after its end: none may hold GPU memory then."""
        self.main_exited = asyncio.Event()
        self._child = child
        self._pidfd = pidfd
        self._asked_to_stop = False
        self._killed = False
        self._detached = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._on_exit)
        self._end = asyncio.create_task(self._watch(), name=f"engine process {self.pid}")

    @property
    def pid(self) -> int:
        return self.leader.pid

    @classmethod
    async def start(
        cls, argv: Sequence[str], env: Mapping[str, str], output: Path, *, inherited: Sequence[int] = ()
    ) -> EngineProcess:
        """Starts `argv` with exactly `env` as its environment; appends standard output and error to `output`. It
        inherits the file descriptors `inherited` and no others.

        A cancellation during the start kills the process first.

        Raises:
            OSError: the process cannot be started.
        """
        # In a thread: Popen returns when the program is read, possibly from a network disk.
        starting = asyncio.get_running_loop().run_in_executor(None, _start, argv, env, output, inherited)
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

    @classmethod
    def adopt(cls, leader: Leader) -> EngineProcess | None:
        """The process that an earlier neuron started; None when it does not run any longer."""
        try:
            pidfd = os.pidfd_open(leader.pid)
        except OSError:
            return None
        # Checked after the pidfd is open: if the leader is alive now, the pidfd refers to it, not to another process.
        if leader.alive:
            return cls(leader, pidfd, None)
        os.close(pidfd)
        return None

    async def wait(self) -> int | None:
        """Waits until all members are gone. Returns the exit code of the main process (negative: the signal that killed
        it); None if it is not our child."""
        return await asyncio.shield(self._end)

    async def stop(self, grace_secs: float, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Sends signal `number` to the main process, and SIGKILL to all members after `grace_secs`. Returns as `wait`
        does."""
        if not self.main_exited.is_set() and not self._asked_to_stop:
            self._asked_to_stop = True
            self._signal(number)
        try:
            async with timeout(grace_secs):
                await self.main_exited.wait()
        except asyncio.TimeoutError:
            log.warning("engine process %d still runs %g s after %s: killing it", self.pid, grace_secs, number.name)
            await self.kill()
        return await self.wait()

    async def kill(self) -> int | None:
        """Sends SIGKILL to the main process, then to the remaining members. Returns as `wait` does."""
        self._killed = True
        self._signal(signal.SIGKILL)
        return await self.wait()

    def kill_now(self) -> None:
        """Sends SIGKILL to all members before it returns; `wait` returns when they are gone.

        Blocks for some milliseconds. For an immediate exit.
        """
        self._killed = True
        if not self._end.done():
            self.pids_seen |= session.kill_members(self.leader)

    async def detach(self) -> None:
        """Stops watching; the engine keeps running, for the next neuron to adopt."""
        self._detached = True
        self._end.cancel()
        await asyncio.wait([self._end])

    def _signal(self, number: int) -> None:
        """Signals the main process through its pidfd: its pid may belong to another process by now."""
        if not self._end.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.main_exited.set()

    async def _watch(self) -> int | None:
        try:
            await self.main_exited.wait()
            if self._asked_to_stop and not self._killed:
                await self._let_helpers_exit()
            await self._kill_remaining()
        except BaseException:  # the loop is being torn down: only a detached engine may survive
            if not self._detached:
                session.kill_members(self.leader)
            raise
        finally:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            if self._child is not None and self._detached:
                self._child.returncode = 0  # otherwise Popen warns when it is garbage-collected
            elif self._child is not None:
                self._child.wait()
        return None if self._child is None else self._child.returncode

    async def _let_helpers_exit(self) -> None:
        deadline = self._loop.time() + LINGER_SECS
        while True:  # there is no notification for a process that is not our child
            if self._killed or self._loop.time() >= deadline or not await self._live_members():
                return
            await asyncio.sleep(_SCAN_SECS[1] / 2)

    async def _live_members(self) -> set[int]:
        found = await asyncio.to_thread(session.live_members, self.leader)
        self.pids_seen |= found
        return found

    async def _kill_remaining(self) -> None:
        pause, waited, warned = _SCAN_SECS[0], 0.0, 0.0
        while alive := await asyncio.to_thread(session.kill_members, self.leader):
            self.pids_seen |= alive
            await asyncio.sleep(pause)
            waited += pause
            pause = min(pause * 2, _SCAN_SECS[1])
            if waited - warned >= _STUCK_SECS:
                warned = waited
                log.warning(
                    "processes %s of engine %d still exist %.0f s after SIGKILL", sorted(alive), self.pid, waited
                )
        await asyncio.to_thread(session.reap_orphans, self.leader)


def _start(
    argv: Sequence[str], env: Mapping[str, str], output: Path, inherited: Sequence[int]
) -> tuple[Leader, int, subprocess.Popen[bytes]]:
    # A file, not a pipe: an engine may outlive this neuron, and a broken pipe would kill it.
    with output.open("ab") as sink:
        child = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=inherited,
        )
    found = stat_of(child.pid)
    leader = Leader(child.pid, 0 if found is None else found.start_ticks, env.get(ENGINE_ID_VARIABLE, ""))
    try:
        return leader, os.pidfd_open(child.pid), child
    except BaseException:
        session.kill_members(leader)
        child.wait()
        raise
