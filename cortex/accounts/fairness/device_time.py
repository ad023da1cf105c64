"""The accounts of device time: which callers have kept the devices, and what that cost the others. No I/O.

An engine's devices are charged to the callers whose requests it serves, and while it loads to those that wait for it:
device-seconds, divided by the caller's weight. When a model loads again after it was evicted for another, those pay
that waited for that other. Each second costs as much again for every other caller that waits meanwhile. Accounts fade
with a half-life. A caller that comes back has at least what the least of the present callers has, so that an idle one
saves nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cortex.accounts.caller import ANONYMOUS, PEOPLE, PERSON_PREFIX, Caller

PRESENT_SECS = 30.0
"""A caller counts as a user of an engine for this long after its last request there, or after it last waited for its
model. Until then it has a claim to what it uses, and is not idle."""
NEGLIGIBLE = 0.01
"""Accounts below this are forgotten, in device-seconds."""
STORE_SECS = 5.0
ChargeKind: TypeAlias = Literal["serving", "loading", "waiting_caused"]
"""What a caller is charged for: an engine that serves it, one that loads for it, and the others that wait meanwhile."""
Charge: TypeAlias = tuple[str, ChargeKind]
"""A caller's label in metrics, and what for."""
MAX_SAMPLE_SECS = 10.0
"""At most this long is charged for one sample: the process may have been stopped meanwhile."""


@dataclass(frozen=True)
class EngineUse:
    """One engine that holds `devices` devices, a shared one in part. By key id: its requests in flight `now`, and those
    `begun` since the last sample; "" stands for clients without a key. `loading`: it does not serve yet."""

    engine: Hashable
    model_id: str
    devices: float
    loading: bool
    now: Mapping[str, int]
    begun: Mapping[str, int]


class DeviceTime:
    """Owns the accounts, by key id. Callers without a key have none. `now` is in seconds, always on one clock."""

    def __init__(
        self,
        half_life_secs: Callable[[], float],
        accounts: Mapping[str, float] | None = None,
        store: Callable[[Mapping[str, float]], None] = lambda _: None,
        caller_of: Callable[[str], Caller | None] = lambda key_id: Caller(key_id, key_id),
    ) -> None:
        """`half_life_secs`: 0 keeps no accounts. `store` gets them every `STORE_SECS` while they change. `caller_of`
        finds the caller with a key id, None for people and for a key that is gone: these have priority 0 and weight
        1."""
        self._half_life_secs = half_life_secs
        self._store = store
        self._caller_of = caller_of
        self._store_at = 0.0
        self._accounts = dict(accounts or {})
        self._seen: dict[str, float] = {}
        self._first_seen: set[str] = set(list(self._accounts)[:2])  # the key ids that were seen first
        self._used: dict[Hashable, dict[str, float]] = {}  # engine -> key id -> its last request
        self._waited: dict[str, dict[str, float]] = {}  # model -> key id -> when it last waited for it
        self._blamed: dict[str, frozenset[str]] = {}  # evicted model -> the keys that it was evicted for
        self._as_of: float | None = None
        self._charged: dict[Charge, float] = {}

    @property
    def charged(self) -> Mapping[Charge, float]:
        """Device-seconds charged since the process began, before weights and fading. Those of a key that is gone
        end."""
        return self._charged

    def keep_callers(self, names: AbstractSet[str]) -> None:
        """Forgets what keys with other names were charged: they are gone."""
        self._charged = {
            (label, kind): secs for (label, kind), secs in self._charged.items() if label in names or label == PEOPLE
        }

    @property
    def accounts(self) -> Mapping[str, float]:
        """Device-seconds by key id, divided by the caller's weight, as of the last sample. A new object whenever they
        change."""
        return self._accounts

    @property
    def several_callers(self) -> bool:
        """Whether more than one caller has been seen. Those without a key count as one."""
        return len(self._first_seen) > 1

    @property
    def kept(self) -> bool:
        """Whether accounts are kept."""
        return self._half_life_secs() > 0

    def users(self, engine: Hashable, model_id: str, now: float) -> frozenset[Caller]:
        """The callers that this engine of the model serves, or served within `PRESENT_SECS`, and those that waited for
        the model so lately: an engine that has just been loaded is theirs before a sample has seen their requests."""
        return frozenset(map(self._caller, self._user_keys(engine, model_id, now))) if self.kept else frozenset()

    def waits(self, caller: Caller, model_id: str, now: float) -> None:
        """A request of the caller waits for the model."""
        self._see(caller.key_id, now)
        self._waited.setdefault(model_id, {})[caller.key_id] = now

    def evicted(self, models: Iterable[str], callers: Iterable[Caller]) -> None:
        """Engines of these models are evicted for a model that these callers wait for."""
        keys = frozenset(each.key_id for each in callers if each.key_id)
        self._blamed.update(dict.fromkeys(models, keys))

    def sample(self, engines: Sequence[EngineUse], waiting: Mapping[str, Iterable[Caller]], now: float) -> None:
        """Charges the time since the last sample. `waiting` are the callers in the queue by model id."""
        secs = 0.0 if self._as_of is None else min(max(0.0, now - self._as_of), MAX_SAMPLE_SECS)
        self._as_of = now
        if not self.kept:
            self._accounts = {}
            return
        queued = {model_id: {each.key_id for each in callers} for model_id, callers in waiting.items()}
        self._note_waiting(queued, now)
        fade = 0.5 ** (secs / self._half_life_secs())
        self._accounts = {key_id: had * fade for key_id, had in self._accounts.items() if had * fade > NEGLIGIBLE}
        shares = [self._shares(each, queued.get(each.model_id, set()), now) for each in engines]
        self._used = {each.engine: self._used[each.engine] for each in engines}
        serving = {each.model_id for each in engines if not each.loading}
        for each, charged in zip(engines, shares, strict=True):
            blamed = self._blamed.get(each.model_id)
            if blamed is not None and each.model_id in serving:
                del self._blamed[each.model_id]
            delayed = {
                key_id
                for model_id, keys in queued.items()
                if model_id not in serving and (model_id != each.model_id or blamed is not None)
                for key_id in keys
            }
            whole = sum(charged.values())
            for key_id, share in charged.items():
                if key_id:
                    own, others = secs * each.devices * share / whole, len(delayed - {key_id})
                    self._charge(key_id, own * (1 + others))
                    self._count(key_id, "loading" if each.loading else "serving", own)
                    self._count(key_id, "waiting_caused", own * others)
        if now >= self._store_at and self._accounts:
            self._store(self._accounts)
            self._store_at = now + STORE_SECS

    def _shares(self, use: EngineUse, queued: set[str], now: float) -> Mapping[str, float]:
        """The keys that pay for the engine, in proportion."""
        used = self._used.setdefault(use.engine, {})
        active = {
            key_id: requests
            for key_id in use.now.keys() | use.begun.keys()
            if (requests := max(use.now.get(key_id, 0), use.begun.get(key_id, 0))) > 0
        }
        for key_id in active:
            self._see(key_id, now)
            used[key_id] = now
        for key_id in [key_id for key_id, at in used.items() if not _is_recent(at, now)]:
            del used[key_id]
        users = self._user_keys(use.engine, use.model_id, now)
        if use.loading:
            return dict.fromkeys(self._blamed.get(use.model_id) or queued or users, 1.0)
        return active or dict.fromkeys(users, 1.0)

    def _user_keys(self, engine: Hashable, model_id: str, now: float) -> set[str]:
        waited = self._waited.get(model_id, {})
        return {*self._used.get(engine, {}), *(key_id for key_id, at in waited.items() if _is_recent(at, now))}

    def _note_waiting(self, queued: Mapping[str, Iterable[str]], now: float) -> None:
        recent = {
            model_id: {key_id: at for key_id, at in waited.items() if _is_recent(at, now)}
            for model_id, waited in self._waited.items()
        }
        self._waited = {model_id: waited for model_id, waited in recent.items() if waited}
        for model_id, keys in queued.items():
            self._waited.setdefault(model_id, {}).update(dict.fromkeys(keys, now))

    def _charge(self, key_id: str, secs: float) -> None:
        self._accounts[key_id] = self._accounts.get(key_id, 0.0) + secs / self._caller(key_id).weight

    def _count(self, key_id: str, kind: ChargeKind, secs: float) -> None:
        gone = self._caller_of(key_id) is None and not key_id.startswith(PERSON_PREFIX)
        if secs and not gone:  # or it would be in metrics by its id
            charge = self._caller(key_id).label, kind
            self._charged[charge] = self._charged.get(charge, 0.0) + secs

    def _see(self, key_id: str, now: float) -> None:
        if len(self._first_seen) < 2:
            self._first_seen.add(key_id)
        if not key_id:
            return
        before, self._seen[key_id] = self._seen.get(key_id), now
        if before is not None and _is_recent(before, now):
            return
        self._seen = {other: at for other, at in self._seen.items() if _is_recent(at, now)}
        least = min((self._accounts.get(other, 0.0) for other in self._seen if other != key_id), default=0.0)
        if least > self._accounts.get(key_id, 0.0):
            self._accounts = {**self._accounts, key_id: least}

    def _caller(self, key_id: str) -> Caller:
        return (self._caller_of(key_id) or Caller(key_id, key_id)) if key_id else ANONYMOUS


def _is_recent(at: float, now: float) -> bool:
    return now - at <= PRESENT_SECS
