"""All keys in force, from the database, the file and the environment; owned by the control."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cortex.accounts.caller import Caller
from cortex.accounts.database.source import DatabaseError
from cortex.accounts.keys.api_key import ApiKey, digest_of, new_secret, prefix_of
from cortex.accounts.keys.key_table import NO_KEYS, key_table
from cortex.accounts.keys.key_terms import KeyTerms, foreign_budget, parse_expiry
from cortex.accounts.keys.provisioned import ENVIRONMENT, keys_in_environment, keys_in_file
from cortex.accounts.limits.terms import KeyLimits
from shared.errors import Conflict, InvalidRequest, NotFound, ServiceError, Unavailable, shortened
from shared.protocol import ErrorCode
from shared.retry_after import CONTROL_PROCESS_SECS
from shared.settings import SettingsError
from shared.subscribers import Subscribers
from shared.system.files import Stamp, stamp_of

if TYPE_CHECKING:
    from cortex.accounts.keys.key_store import KeyStore

log = logging.getLogger(__name__)

LOOK_SECS = 1.0
"""How often the database and the file are checked for changes that others made."""
STEADY_SECS = 0.2
"""A file that changes is read once it has been the same for this long: it may be written in pieces."""


class KeyRing:
    """Collects the keys and announces changes. Of two keys with one secret, that of the environment counts before that
    of the file and that of the database."""

    def __init__(
        self, store: KeyStore | None = None, environ: Mapping[str, str] = os.environ, *, currency: str = "EUR"
    ) -> None:
        """Without a store, only the file and the environment have keys. `currency`: of the prices, and so of budgets.

        Raises:
            SettingsError: the environment has a wrong key.
        """
        self._store = store
        self._currency = currency
        self._fixed = keys_in_environment(environ, currency)
        self._file: Path | None = None
        self._read: Stamp = ()  # the version of the file that was read last
        self._in_file: Sequence[ApiKey] = ()
        self._stored: Sequence[ApiKey] = ()
        self._version = -1
        self._failing = False
        self.changes: Subscribers[[]] = Subscribers()
        self._refreshing = asyncio.Lock()
        self._known: Sequence[ApiKey] = ()
        self.table = NO_KEYS
        self._by_id: dict[str, ApiKey] = {}
        self._callers: dict[str, Caller] = {}
        self._renew()

    @property
    def keys(self) -> list[ApiKey]:
        """All keys that are not revoked."""
        return [*self._stored, *self._in_file, *self._fixed]

    @property
    def limits(self) -> dict[str, KeyLimits]:
        """The limits of the keys that have any, by id."""
        return {key.id: key.limits for key in self.keys if not key.limits.unlimited}

    def foreign_budgets(self, currency: str) -> list[str]:
        """What would be wrong with the budgets of the keys in the database and the environment if prices were in this
        currency."""
        found = [(key.name, foreign_budget(key.limits, currency)) for key in (*self._stored, *self._fixed)]
        return [f"API key {name!r}: {problem}" for name, problem in found if problem is not None]

    async def load(self, file: Path | None) -> None:
        """Reads the keys of this file and of the database.

        Raises:
            SettingsError: the file has a wrong key.
            DatabaseError: the database cannot be read.
        """
        self._file = file
        await asyncio.to_thread(self._read_file)
        if self._store is not None:
            self._version, self._stored = await self._store.version(), await self._store.keys()
        self._renew()

    def configure(self, file: Path | None, currency: str) -> None:
        """The keys of the file are those of another one from now on, or have budgets in another currency. It is read by
        `file_loop`."""
        if (file, currency) != (self._file, self._currency):
            self._file, self._currency = file, currency
            self._read = (-1,)  # unlike any version, so that it is read, or is no longer in force

    @property
    def loops(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """What has to run all the time, by name."""
        stored = {} if self._store is None else {"keys in the database": self.database_loop}
        return {"keys in the file": self.file_loop, **stored}

    def caller(self, key_id: str) -> Caller | None:
        """The key with this id as requests see it; None if it is gone."""
        return self._callers.get(key_id)

    def valid_key(self, key_id: str) -> ApiKey | None:
        """The key with this id; None if it is gone or has expired."""
        key = self._by_id.get(key_id)
        expired = key is not None and key.expires_at is not None and key.expires_at <= time.time()
        return None if expired else key

    async def database_loop(self) -> None:
        """Notices what other processes change. Never returns. While the database cannot be read the last keys stay."""
        while True:
            await asyncio.sleep(LOOK_SECS)
            await self._refresh()

    async def file_loop(self) -> None:
        """Notices changes of the file. Never returns. A file with an error changes nothing."""
        while True:
            await asyncio.sleep(LOOK_SECS)
            if self._file is None and not self._read:
                continue  # none is configured, and none was
            stamp = await asyncio.to_thread(_stamp, self._file)
            if stamp == self._read:
                continue
            await asyncio.sleep(STEADY_SECS)
            try:
                if await asyncio.to_thread(_stamp, self._file) == stamp:
                    await asyncio.to_thread(self._read_file)
            except SettingsError as error:
                for problem in error.problems:
                    log.error("keys not reloaded: %s", problem)  # noqa: TRY400 - the message says all
            else:
                self._renew()

    async def create(self, terms: KeyTerms) -> tuple[ApiKey, str]:
        """A new key and its secret, which is not kept.

        Raises:
            ServiceError: the name is taken, a value is invalid, or the database cannot be written.
        """
        now, secret = time.time(), new_secret()
        try:
            expires_at = None if terms.expires is None else parse_expiry(terms.expires, now)
        except ValueError as error:
            raise InvalidRequest(f"expires: {error}", param="expires") from error
        foreign = foreign_budget(terms.key_limits, self._currency)
        if foreign is not None:
            raise InvalidRequest(foreign, param="budget")
        store = self._writable()
        key = ApiKey(
            "",
            terms.name,
            digest_of(secret),
            prefix_of(secret),
            role=terms.role,
            models=tuple(terms.models),
            priority=terms.priority,
            weight=terms.weight,
            limits=terms.key_limits,
            created_at=now,
            expires_at=expires_at,
        )
        if key.name in self._provisioned or not await _written(store, store.add(key)):
            raise Conflict(f"there is a key named {key.name!r}", code=ErrorCode.KEY_EXISTS, param="name")
        log.info("created the API key %r with the role %s", key.name, key.role)
        await self._refresh()
        return self._named(key.name), secret

    async def revoke(self, name: str) -> None:
        """Ends a key.

        Raises:
            ServiceError: there is none of that name in the database, or the database cannot be written.
        """
        store = self._writable()
        try:
            found = await store.revoke(name, time.time())
        except DatabaseError as error:
            was_stored = self._is_stored(name)
            await self._refresh()
            if was_stored and not self._is_stored(name):
                return  # only the answer was lost
            if not was_stored:
                raise _unavailable(str(error)) from error
            raise _not_changed(f"the key {name!r} was not revoked and stays valid", store, error) from error
        if not found:
            raise self._not_stored(name)
        await self._refresh()

    async def rotate(self, name: str) -> tuple[ApiKey, str]:
        """Gives a key a new secret, and returns both. The old secret ends.

        Raises:
            ServiceError: there is none of that name in the database, or the database cannot be written.
        """
        secret, store = new_secret(), self._writable()
        if not await _written(store, store.replace_secret(name, digest_of(secret), prefix_of(secret))):
            raise self._not_stored(name)
        await self._refresh()
        return self._named(name), secret

    def _is_stored(self, name: str) -> bool:
        return any(key.name == name for key in self._stored)

    @property
    def _provisioned(self) -> dict[str, str]:
        """The sources of keys outside the database, by name."""
        return {key.name: key.source for key in (*self._in_file, *self._fixed)}

    def _writable(self) -> KeyStore:
        if self._store is None:
            raise Unavailable(
                "this cortex has no database for keys: set state_dir in cortex.toml to a directory that it can write",
                code=ErrorCode.DATABASE_UNAVAILABLE,
                retry_after=CONTROL_PROCESS_SECS,
                permanent=True,
            )
        return self._store

    def _named(self, name: str) -> ApiKey:
        found = next((key for key in self._stored if key.name == name), None)
        if found is None:  # the database failed after the change, or another cortex was faster
            raise Unavailable(
                f"the key {name!r} was changed, but cannot be read: rotate it to get its secret",
                code=ErrorCode.DATABASE_UNAVAILABLE,
                retry_after=CONTROL_PROCESS_SECS,
            )
        return found

    def _not_stored(self, name: str) -> ServiceError:
        source = self._provisioned.get(name)
        if source is None:
            return NotFound(f"there is no key named {shortened(name)!r}", code=ErrorCode.KEY_NOT_FOUND, param="name")
        where = "the environment variable CORTEX_KEYS" if source == ENVIRONMENT else source
        return Conflict(f"the key {name!r} is in {where}: change it there", code=ErrorCode.KEY_PROVISIONED)

    async def _refresh(self) -> None:
        """Reads the keys again if they have changed."""
        assert self._store is not None
        try:
            async with self._refreshing:  # of two at a time, the older one could end last and bring back a revoked key
                version = await self._store.version()
                if version != self._version:
                    self._stored = await self._store.keys()
                    self._version = version
                    self._renew()
        except DatabaseError as error:
            if not self._failing:
                log.warning("keys cannot be read, the last ones stay in force: %s", error)
            self._failing = True
        else:
            if self._failing:
                log.info("keys can be read again")
            self._failing = False

    def _read_file(self) -> None:
        """Blocks."""
        self._read = _stamp(self._file)  # before reading, so that a change during the read is noticed afterwards
        self._in_file = [] if self._file is None else keys_in_file(self._file, self._currency)

    def _renew(self) -> None:
        keys = self.keys
        configured = self._version > 0 or self._file is not None  # it counts changes of keys
        if keys != self._known or configured != self.table.configured:
            self._known = keys
            self.table = key_table(keys, configured=configured)
            self._by_id = {key.id: key for key in keys}
            self._callers = {key.id: key.caller for key in keys}
            self.changes.announce()


async def _written(store: KeyStore, change: Awaitable[bool]) -> bool:
    try:
        return await change
    except DatabaseError as error:
        raise _not_changed("the keys were not changed", store, error) from error


def _not_changed(what: str, store: KeyStore, error: DatabaseError) -> ServiceError:
    return _unavailable(f"{what}: {error}; {store.remedy}, then repeat the command")


def _unavailable(message: str) -> ServiceError:
    return Unavailable(message, code=ErrorCode.DATABASE_UNAVAILABLE, retry_after=CONTROL_PROCESS_SECS)


def _stamp(file: Path | None) -> Stamp:
    return () if file is None else stamp_of(file)
