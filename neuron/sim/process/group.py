"""The parts of a simulated engine on several hosts. They meet at rank 0's port before the load, as torch's do.

After the load no part notices that another is lost. Rank 0 stays healthy and generates nothing more: so does vLLM 0.32
if the other host loses power. (If only its process dies, vLLM's rank 0 fails at the next request.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from neuron.sim.engine import console
from neuron.sim.engine.arguments import NodeOfGroup

_MEET_SECS = 600.0  # torch's
_RETRY_SECS = 0.05
_GO, _READY = b"go\n", b"ready\n"


class PartLost(Exception):
    """Another part did not come, or has ended."""


class GroupLink:
    """The connections of one part: rank 0 has one to each other part, the others one to rank 0. `lost` is set when one
    of them ends. An engine on one host has none."""

    def __init__(self, node: NodeOfGroup | None) -> None:
        self.lost = asyncio.Event()
        self._node = node or NodeOfGroup(1, 0, "", 0)
        self._server: asyncio.Server | None = None
        self._peers: dict[int, asyncio.StreamWriter] = {}
        self._complete = asyncio.Event()
        self._ready: set[int] = set()
        self._all_ready = asyncio.Event()
        self._watching: set[asyncio.Task[None]] = set()
        self._on_lost: Callable[[], None] | None = None

    async def __aenter__(self) -> GroupLink:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the connections."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for writer in self._peers.values():
            writer.close()
        if self._server is not None:
            self._server.close()

    async def meet(self) -> None:
        """Returns when all parts are there.

        Raises:
            OSError: rank 0 cannot listen.
            PartLost: a part did not come within ten minutes.
        """
        node = self._node
        if node.count == 1:
            return
        world = f"world_size={node.count} rank={node.rank} distributed_init_method=tcp://{node.address}:{node.port}"
        console.log("EngineCore", "parallel_state.py:1906", f"{world} backend=gloo")
        if node.rank == 0:
            await self._receive_all()
        else:
            await self._join()

    async def finish(self) -> None:
        """This part has loaded. Rank 0 returns when all have."""
        if self._node.rank:
            self._peers[0].write(_READY)
        elif self._node.count > 1:
            await self._all_ready.wait()

    def when_lost(self, call: Callable[[], None]) -> None:
        """Calls it when a part is lost, at once if one is."""
        self._on_lost = call
        if self.lost.is_set():
            call()

    async def _receive_all(self) -> None:
        self._server = await asyncio.start_server(self._receive, self._node.address, self._node.port)
        try:
            await asyncio.wait_for(self._complete.wait(), _MEET_SECS)
        except asyncio.TimeoutError as error:
            came = f"{1 + len(self._peers)}/{self._node.count} clients joined"
            raise PartLost(f"Timed out after {_MEET_SECS:g} seconds waiting for clients. {came}.") from error
        for writer in self._peers.values():
            writer.write(_GO)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readline()).strip()
        if not line.isdigit() or not 0 < int(line) < self._node.count:
            writer.close()
            return
        self._peers[int(line)] = writer
        self._watch(int(line), reader)
        if len(self._peers) == self._node.count - 1:
            self._complete.set()

    async def _join(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _MEET_SECS
        while loop.time() < deadline:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(self._node.address, self._node.port)
                writer.write(f"{self._node.rank}\n".encode())
                self._peers[0] = writer
                if await reader.readline() == _GO:
                    self._watch(0, reader)
                    return
            await asyncio.sleep(_RETRY_SECS)
        raise PartLost(f"client socket has timed out after {_MEET_SECS:g}s while trying to connect to rank 0")

    def _watch(self, rank: int, reader: asyncio.StreamReader) -> None:
        self._watching.add(asyncio.create_task(self._until_lost(rank, reader), name=f"part {rank} of the group"))

    async def _until_lost(self, rank: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                if line == _READY:
                    self._ready.add(rank)
                if len(self._ready) == self._node.count - 1:
                    self._all_ready.set()
        self.lost.set()
        if self._on_lost is not None:
            self._on_lost()
