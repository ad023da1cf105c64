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

from neuron.engine import session
from neuron.engine.session import Leader
from neuron.harness.base import ENGINE_ID_VARIABLE
from shared.process_stat import stat_of
from shared.tasks import timeout

log = logging.getLogger(__name__)

LINGER_SECS = 2.0
"""How long helpers may outlive a main process that ended as asked, before they are killed: they clean up /dev/shm."""
_SCAN_SECS = (0.01, 0.1)  # first and longest pause between two looks at a session that is being emptied
_STUCK_SECS = 10.0


class EngineProcess:
    """A process in a session of its own, watched until nothing of it is left.

    One task (`_watch`) sees the end of the main process, kills what stayed behind and reaps; everything else only sends
    signals and waits for it. A main process that is our child stays a zombie until the rest is gone, so that its
    number, which identifies the session, cannot be reused by then; of one that an earlier neuron started
    `neuron.engine.session` makes sure otherwise.
    """

    def __init__(self, leader: Leader, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.leader = leader
        self.pids_seen: set[int] = {leader.pid}
        """Every pid known to have been of this engine, also after its end: what memory must be free of."""
        self.main_exited = asyncio.Event()
        self._child = child
        self._pidfd = pidfd
        self._asked_to_stop = False
        self._killed = False
        self._left = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._on_exit)
        self._end = asyncio.create_task(self._watch(), name=f"engine process {self.pid}")

    @property
    def pid(self) -> int:
        return self.leader.pid

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

    @classmethod
    def adopt(cls, leader: Leader) -> EngineProcess | None:
        """The process that an earlier neuron started; None when it runs no more."""
        try:
            pidfd = os.pidfd_open(leader.pid)
        except OSError:
            return None
        # Looked at with the descriptor in hand: what it stands for was alive then, and so it is this very process.
        if leader.alive:
            return cls(leader, pidfd, None)
        os.close(pidfd)
        return None

    async def wait(self) -> int | None:
        """The exit code of the main process (negative: the signal that ended it), once all of the engine is gone. None:
        not known, since it is not our child."""
        return await asyncio.shield(self._end)

    async def stop(self, grace_secs: float) -> int | None:
        """SIGTERM to the main process; what is there after `grace_secs` gets SIGKILL. Returns as `wait`."""
        if not self.main_exited.is_set() and not self._asked_to_stop:
            self._asked_to_stop = True
            self._signal(signal.SIGTERM)
        try:
            async with timeout(grace_secs):
                await self.main_exited.wait()
        except asyncio.TimeoutError:
            log.warning("engine process %d is still there %g s after SIGTERM: killing it", self.pid, grace_secs)
            await self.kill()
        return await self.wait()

    async def kill(self) -> int | None:
        """SIGKILL to the main process, then to all that is left. Returns as `wait`."""
        self._killed = True
        self._signal(signal.SIGKILL)
        return await self.wait()

    def kill_now(self) -> None:
        """SIGKILL to every process of the engine, before the next line of the caller runs. `wait` tells when they are
        gone.

        Blocks for some milliseconds: for an exit that waits for nothing.
        """
        self._killed = True
        if not self._end.done():
            self.pids_seen |= session.kill_members(self.leader)

    async def leave(self) -> None:
        """Lets go of it: it runs on, for the next neuron to find."""
        self._left = True
        self._end.cancel()
        await asyncio.wait([self._end])

    def _signal(self, number: int) -> None:
        """To the main process, which the descriptor stands for: its number may be another's by now."""
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
                await self._linger()
            await self._kill_rest()
        except BaseException:  # the loop is being torn down: nothing may survive it, but what was left on purpose
            if not self._left:
                session.kill_members(self.leader)
            raise
        finally:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            if self._child is not None and self._left:
                self._child.returncode = 0  # otherwise asyncio waits for it again, and warns, when it is collected
            elif self._child is not None:
                self._child.wait()
        return None if self._child is None else self._child.returncode

    async def _linger(self) -> None:
        deadline = self._loop.time() + LINGER_SECS
        while True:  # nothing tells when a process ends that is not our child
            if self._killed or self._loop.time() >= deadline or not await self._live_members():
                return
            await asyncio.sleep(_SCAN_SECS[1] / 2)

    async def _live_members(self) -> set[int]:
        found = await asyncio.to_thread(session.live_members, self.leader)
        self.pids_seen |= found
        return found

    async def _kill_rest(self) -> None:
        pause, waited, told = _SCAN_SECS[0], 0.0, 0.0
        while alive := await asyncio.to_thread(session.kill_members, self.leader):
            self.pids_seen |= alive
            await asyncio.sleep(pause)
            waited += pause
            pause = min(pause * 2, _SCAN_SECS[1])
            if waited - told >= _STUCK_SECS:
                told = waited
                log.warning("processes %s of engine %d survive SIGKILL since %.0f s", sorted(alive), self.pid, waited)
        await asyncio.to_thread(session.reap_orphans, self.leader)


def _start(argv: Sequence[str], env: Mapping[str, str], output: Path) -> tuple[Leader, int, subprocess.Popen[bytes]]:
    # A file and not a pipe: an engine may outlive this neuron, and must not die of a broken pipe then.
    with output.open("ab") as sink:
        child = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    found = stat_of(child.pid)
    leader = Leader(child.pid, 0 if found is None else found.start_ticks, env.get(ENGINE_ID_VARIABLE, ""))
    try:
        return leader, os.pidfd_open(child.pid), child
    except BaseException:
        session.kill_members(leader)
        child.wait()
        raise
