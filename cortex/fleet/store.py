"""State that survives a restart: drained and registered neurons, models held back, load times, context lengths, the
device time of API keys, and which engine made a response."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from cortex.routing.replica import ANY_NODE, ModelOnNode, Replica, ReplicaKey
from cortex.routing.response_owners import OwnerList, ResponseMaker, ResponseOwners
from shared.protocol import first_problem
from shared.system.files import replace_file
from shared.tasks import TaskSet

log = logging.getLogger(__name__)

NAME = "state.json"
WRITE_AFTER_SECS = 2.0
"""Changes within this time are written together."""
RETRY_SECS = 10.0
STORED_IDS = 5000
"""Newest responses in the file: it is written whole."""

Secs = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Responses(BaseModel):
    """Which engines made which responses: `made` has the place in `engines` (model, neuron and instance, which files of
    earlier versions lack) by id, `adapters` the adapter by the same place, `keys` the id of the API key that it was
    made for, which files of earlier versions lack."""

    engines: list[tuple[str, str] | tuple[str, str, str]] = []
    adapters: dict[int, str] = {}
    keys: dict[int, str] = {}
    made: dict[str, int] = {}

    @classmethod
    def of(cls, owners: OwnerList) -> _Responses:
        adapters = {place: maker.engine.adapter for place, maker in enumerate(owners.makers)}
        keys = {place: maker.key_id for place, maker in enumerate(owners.makers)}
        return cls(
            engines=[tuple(maker.engine.key) for maker in owners.makers],
            adapters={place: adapter for place, adapter in adapters.items() if adapter is not None},
            keys={place: key_id for place, key_id in keys.items() if key_id is not None},
            made=owners.responses,
        )

    @property
    def owners(self) -> OwnerList:
        """Without URLs of the engines."""
        makers = []
        for place, (model_id, node, *instance) in enumerate(self.engines):
            key = ReplicaKey(model_id, node, *(instance or [""]))
            engine = Replica(key=key, name=key.name, url="", adapter=self.adapters.get(place))
            makers.append(ResponseMaker(engine, self.keys.get(place)))
        return OwnerList(makers, {made: place for made, place in self.made.items() if 0 <= place < len(makers)})


class _DeviceTime(BaseModel):
    """The accounts by key id, in device-seconds, as of a Unix time."""

    as_of: Secs = 0.0
    accounts: dict[str, Secs] = {}


class KeptRegistration(BaseModel):
    """A neuron that has announced itself: `token` is what it expects from cortex, `process` its `instance_id`,
    `dial_key` what its own connections show. Valid until a Unix time."""

    name: str
    endpoint: str
    token: str | None = None
    process: str | None = None
    dial_key: str | None = None
    expires_at: Secs


class _State(BaseModel):
    """The file's contents. Load times, in seconds, and holds, until a Unix time, are by model and neuron."""

    version: Literal[1]
    drained: list[str] = []
    decisions_version: tuple[str, int] | None = None
    holds: dict[str, dict[str, Secs]] = {}
    load_secs: dict[str, dict[str, Secs]] = {}
    max_model_len: dict[str, Annotated[int, Field(gt=0)]] = {}
    responses: _Responses = _Responses()
    device_time: _DeviceTime = _DeviceTime()
    registrations: list[KeptRegistration] = []


class DirectoryInUse(OSError):
    """Another cortex writes in the state directory."""


class StateFile:
    """Owns the file and its contents, and the lock of its directory. Only this user can read it: it has the tokens of
    registered neurons. A file that cannot be read is renamed; one that
    cannot be written causes one warning. Neither stops cortex from serving.

    `problem` says why the file is out of date; None if it is current.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Reads the state in the directory, which is created on the first write. None: keeps no state. Blocks."""
        self._directory = directory
        self._drained: set[str] = set()
        self._decisions_version: tuple[str, int] | None = None
        self._holds: dict[ModelOnNode, float] = {}
        self._load_secs: dict[str, dict[str, float]] = {}
        self._max_model_len: dict[str, int] = {}
        self._device_time = _DeviceTime()
        self._registrations: list[KeptRegistration] = []
        self.response_owners = ResponseOwners()
        self._lock: int | None = None
        self._acquiring = threading.Lock()
        self._closed = False
        self._unwritten = False
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tasks = TaskSet()
        self.problem: str | None = None
        if directory is not None:
            self._read(directory / NAME)

    @property
    def directory(self) -> Path | None:
        return self._directory

    @property
    def drained(self) -> Collection[str]:
        """Names of drained neurons, including those no longer in the configuration."""
        return frozenset(self._drained)

    def set_drained(self, name: str, drained: bool) -> None:
        if drained != (name in self._drained):
            (self._drained.add if drained else self._drained.discard)(name)
            self._touch()

    @property
    def decisions_version(self) -> tuple[str, int] | None:
        """Which database that several cortexes use has these drains and holds: its id, and how often they had changed
        there. None if there is none."""
        return self._decisions_version

    @decisions_version.setter
    def decisions_version(self, version: tuple[str, int] | None) -> None:
        if version != self._decisions_version:
            self._decisions_version = version
            self._touch()

    @property
    def holds(self) -> Mapping[ModelOnNode, float]:
        """Until when operators hold models back, in Unix time, by model and neuron (or ANY_NODE)."""
        now = time.time()
        return {key: until for key, until in self._holds.items() if until > now} if self._holds else {}

    def hold_back(self, key: ModelOnNode, until: float) -> None:
        """The model is not to be loaded there before this Unix time."""
        self._holds = {**self.holds, key: until}
        self._touch()

    def replace_holds(self, holds: Mapping[ModelOnNode, float]) -> None:
        """These are all."""
        self._holds = dict(holds)
        self._touch()

    def end_holds(self, model_id: str, node: str | None) -> bool:
        """The model may be loaded on this neuron again, with None on all. False if it was not held back there."""
        ended = [key for key in self._holds if key[0] == model_id and (node is None or key[1] in (node, ANY_NODE))]
        for key in ended:
            del self._holds[key]
        if ended:
            self._touch()
        return bool(ended)

    @property
    def load_secs(self) -> Mapping[str, Mapping[str, float]]:
        """Load times in seconds, by model and neuron."""
        return self._load_secs

    def set_load_secs(self, model_id: str, node: str, secs: float) -> None:
        self._load_secs.setdefault(model_id, {})[node] = secs
        self._touch()

    @property
    def max_model_len(self) -> Mapping[str, int]:
        """Context lengths in tokens, by model, as engines gave them."""
        return self._max_model_len

    def set_max_model_len(self, model_id: str, tokens: int) -> None:
        self._max_model_len[model_id] = tokens
        self._touch()

    def device_time(self, half_life_secs: float) -> Mapping[str, float]:
        """The accounts by key id, in device-seconds, which have faded since they were stored."""
        stored = self._device_time
        since = max(0.0, time.time() - stored.as_of)
        fade = 0.5 ** (since / half_life_secs) if half_life_secs else 0.0
        return {key_id: secs * fade for key_id, secs in stored.accounts.items()}

    def set_device_time(self, accounts: Mapping[str, float]) -> None:
        self._device_time = _DeviceTime(as_of=time.time(), accounts=dict(accounts))
        self._touch()

    @property
    def registrations(self) -> Sequence[KeptRegistration]:
        """Those that have not expired."""
        now = time.time()
        return [each for each in self._registrations if each.expires_at > now]

    def set_registrations(self, registrations: Iterable[KeptRegistration]) -> None:
        kept = list(registrations)
        if kept != self._registrations:
            self._registrations = kept
            self._touch()

    def add_response(self, response_id: str, maker: ResponseMaker) -> None:
        """This engine made the response."""
        self.response_owners.add(response_id, maker)
        self._touch()

    async def write_loop(self) -> None:
        """Writes changes shortly after they happen. Never returns."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(WRITE_AFTER_SECS)
            await self.flush()
            if self.problem is not None:
                await asyncio.sleep(RETRY_SECS)
                self._changed.set()

    async def flush(self) -> None:
        """Writes pending changes now. Cancelling the caller does not stop the write."""
        await asyncio.shield(self._tasks.spawn(self._write_changes(), name="state file"))

    async def close(self) -> None:
        """Writes pending changes and releases the lock."""
        await self.flush()
        await self._tasks.close()
        with self._acquiring:  # a thread may be about to write; it must not take the lock again
            self._closed = True
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def acquire_lock(self) -> None:
        """Makes this process the only one that writes in the directory: two would undo each other's changes. Call it
        before each write rather than at startup, when the previous cortex may still be finishing its requests; `close`
        ends it. From any thread. Blocks.

        Raises:
            DirectoryInUse: another cortex writes there.
            OSError: it cannot be written, or this is closed.
        """
        with self._acquiring:
            if self._directory is None:
                return
            if self._closed:
                raise OSError("this cortex has stopped writing there")
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._lock is not None:
                return
            lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise DirectoryInUse("in use by another cortex") from None
            except OSError:
                os.close(lock)
                raise
            self._lock = lock

    def _touch(self) -> None:
        self._unwritten = True
        self._changed.set()

    def _read(self, path: Path) -> None:
        try:
            state = _State.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValidationError) as error:
            aside = path.with_name(f"{NAME}.bad")
            try:
                path.replace(aside)
                fate = f"was renamed to {aside.name}"
            except OSError as failure:
                fate = f"cannot be renamed ({failure.strerror})"
            log.warning(
                "%s is invalid and %s; starting without it, no neuron is drained: %s", path, fate, _reason(error)
            )
            return
        self._drained = set(state.drained)
        self._decisions_version = state.decisions_version
        self._holds = {(model, node): until for model, nodes in state.holds.items() for node, until in nodes.items()}
        self._load_secs = state.load_secs
        self._max_model_len = state.max_model_len
        self._device_time = state.device_time
        self._registrations = state.registrations
        self.response_owners = ResponseOwners(state.responses.owners)

    async def _write_changes(self) -> None:
        async with self._writing:
            self._changed.clear()
            if not self._unwritten or self._directory is None:
                return
            self._unwritten = False
            holds: dict[str, dict[str, float]] = {}
            for (model_id, node), until in self.holds.items():
                holds.setdefault(model_id, {})[node] = until
            state = _State(
                version=1,
                drained=sorted(self._drained),
                decisions_version=self._decisions_version,
                holds=holds,
                load_secs=self._load_secs,
                max_model_len=self._max_model_len,
                device_time=self._device_time,
                registrations=self._registrations,
                responses=_Responses.of(self.response_owners.newest(STORED_IDS)),
            )
            problem = await asyncio.to_thread(self._write, self._directory, state.model_dump_json().encode())
            self._unwritten |= problem is not None
            if problem is not None and self.problem is None:
                log.warning(
                    "%s cannot be written: %s; its changes are lost when this process ends",
                    self._directory / NAME,
                    problem,
                )
            elif problem is None and self.problem is not None:
                log.info("%s can be written again", self._directory / NAME)
            self.problem = problem

    def _write(self, directory: Path, data: bytes) -> str | None:
        """Replaces the file. Returns why it failed, or None."""
        try:
            self.acquire_lock()
            replace_file(directory / NAME, data)
        except DirectoryInUse as error:
            return f"{error}, which counts limits for itself"
        except OSError as error:
            return _reason(error)
        return None


def kept_registrations(directory: Path) -> Sequence[KeptRegistration]:
    """What the state file there has of them; empty if it cannot be read. Changes nothing. Blocks."""
    try:
        return _State.model_validate_json((directory / NAME).read_bytes()).registrations
    except (OSError, ValidationError):
        return []


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        where, reason = first_problem(error)
        return f"{where or 'not JSON'}: {reason}"
    return getattr(error, "strerror", None) or str(error)
