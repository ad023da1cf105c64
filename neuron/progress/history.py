"""This host's history of loads, kept in a file across restarts of neuron."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from neuron.progress.load_times import History, LoadKey, LoadTimes, from_json, to_json
from shared.system.files import replace_file

log = logging.getLogger(__name__)

FILE_NAME = "history.json"  # in the state directory
_MAX_BYTES = 8 * 2**20  # more than `History` can hold


class LoadHistory:
    """Owns the file `path`; None: memory only. Problems with the file cost estimates, never a load."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._history = History()
        self._running: dict[str, tuple[LoadKey, int]] = {}  # by engine id: the most RAM that it has used
        self._unsaved = False
        self._writing = asyncio.Lock()

    async def read(self) -> None:
        """Reads what an earlier neuron wrote. An invalid file is ignored with a warning; the next load replaces it."""
        if self._path is not None:
            self._history = await asyncio.to_thread(_read, self._path)

    def expected(self, key: LoadKey) -> LoadTimes | None:
        """See `History.expected`."""
        return self._history.expected(key)

    def ram_mb(self, key: LoadKey) -> int | None:
        """The most RAM that engines of this key used lately, running ones included; None: never measured."""
        known = [mb for other, mb in self._running.values() if other == key]
        if key in self._history.ram_mb:
            known.append(self._history.ram_mb[key])
        return max(known, default=None)

    def measured_ram(self, engine_id: str, key: LoadKey, mb: int) -> None:
        """What an engine of this key uses of the host's RAM now."""
        self._running[engine_id] = key, max(mb, self._running.get(engine_id, (key, 0))[1])

    def ended(self, engine_id: str) -> None:
        """The engine uses no RAM any more. `save` writes what it used."""
        if engine_id in self._running:
            history = self._history.with_ram(*self._running.pop(engine_id))
            self._unsaved = self._unsaved or history is not self._history
            self._history = history

    async def save(self) -> None:
        """Returns when what is known is in the file, or a warning in the log."""
        if self._unsaved:
            await self._save()

    async def record(self, key: LoadKey, times: LoadTimes) -> None:
        """Adds a successful load. Returns when it is in the file, or a warning in the log."""
        self._history = self._history.with_load(key, times)
        await self._save()

    async def _save(self) -> None:
        self._unsaved = False
        if self._path is not None:
            # In its own task: cancelling the caller must not let two threads write at once.
            await asyncio.shield(asyncio.create_task(self._write(self._path), name="write history of loads"))

    async def _write(self, path: Path) -> None:
        async with self._writing:
            await asyncio.to_thread(_write, path, self._history)  # the newest at that moment


def _read(path: Path) -> History:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        return from_json(json.loads(data))
    except FileNotFoundError:
        return History()
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is not a valid load history and will be replaced: %s", path, error)
        return History()


def _write(path: Path, history: History) -> None:
    """Replaces the file atomically; only this user can read it."""
    try:
        replace_file(path, json.dumps(to_json(history), separators=(",", ":")).encode(), durable=False)
    except OSError as error:
        log.warning("%s cannot be written, so a restart of neuron loses this load: %s", path, error)
