"""The neurons that have announced themselves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from pydantic import ValidationError

from cortex.config.neurons import NeuronEntry
from cortex.fleet.members.dialled.broker_process import DialBroker
from cortex.fleet.members.membership import Membership
from cortex.fleet.members.roster import Registered, registered_until, registration_refusal
from cortex.fleet.state import Fleet
from cortex.fleet.store import KeptRegistration, StateFile
from cortex.upstream.address import DIAL, parse_url
from shared.errors import Conflict, InvalidRequest
from shared.protocol import DialReply, ErrorCode, Registration, RegistrationReply, first_problem
from shared.tasks import timeout

log = logging.getLogger(__name__)

KEEP_SECS = 60.0
"""How often renewed registrations are written to the state file, and how much longer they count there."""


class Registrations:
    """Owns them, and tells the membership of each that comes, moves or has stopped coming."""

    def __init__(
        self,
        membership: Membership,
        fleet: Fleet,
        state: StateFile,
        broker: DialBroker | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a broker neurons with `dial = "out"` are refused."""
        self._membership = membership
        self._fleet = fleet
        self._state = state
        self._broker = broker
        self._clock = clock
        self._kept_at = clock()
        self._known: dict[str, Registered] = {}
        self._refused: dict[str, str] = {}  # the last refusal of each name, which is logged once
        self._changed = asyncio.Event()

    def restore(self) -> None:
        """Those of the previous cortex, which ended a moment ago: its neurons may be asked at once."""
        for kept in self._state.registrations:
            try:
                if kept.dial_key is not None and self._broker is not None:
                    entry = NeuronEntry.dialling(kept.name, kept.token)
                else:
                    entry = NeuronEntry(name=kept.name, endpoint=kept.endpoint, token=kept.token)
            except ValidationError:  # written by another version, or with another configuration
                continue
            until = self._clock() + kept.expires_at - time.time()
            self._known[entry.name] = Registered(entry, kept.process, until, kept.dial_key)
        self._tell()

    def register(self, wanted: Registration) -> RegistrationReply:
        """Accepts an announcement.

        Raises:
            InvalidRequest: its name, endpoint or token cannot be used, or it wants to keep connections and must not.
            Conflict: another neuron has this name.
        """
        entry = self._entry(wanted)
        now, node = self._clock(), self._fleet.snapshot().nodes.get(entry.name)
        wanted = wanted.model_copy(update={"endpoint": entry.endpoint})
        connected = self._broker is not None and entry.name in self._broker.connected
        refusal = registration_refusal(
            wanted, listed=self._membership.listed, registered=self._known, node=node, connected=connected
        )
        if refusal is not None:
            if self._refused.get(wanted.name) != refusal:
                log.warning("registration refused: %s", refusal)
                self._refused[wanted.name] = refusal
            raise Conflict(refusal, code=ErrorCode.NEURON_NAME_TAKEN, param="name")
        until = registered_until(wanted, now)
        if entry.name not in self._membership.listed:
            self._accept(entry, wanted.instance_id, until)
        return RegistrationReply(name=entry.name, expires_secs=until - now, dial=self._dial_reply(entry))

    def _entry(self, wanted: Registration) -> NeuronEntry:
        dials = urlsplit(wanted.endpoint).scheme == DIAL
        if dials and self._broker is None:
            raise InvalidRequest(
                "this cortex takes no connections from neurons: set [discovery] dial_listen in cortex.toml, or remove "
                'dial = "out" from neuron.toml',
                param="endpoint",
            )
        try:
            if dials:
                return NeuronEntry.dialling(wanted.name, wanted.token)
            parse_url(wanted.endpoint)
            return NeuronEntry(name=wanted.name, endpoint=wanted.endpoint, token=wanted.token)
        except ValidationError as error:
            where, reason = first_problem(error)
            raise InvalidRequest(f"{where}: {reason}", param=where) from error
        except ValueError as error:
            raise InvalidRequest(f"endpoint: {error}", param="endpoint") from error

    def _dial_reply(self, entry: NeuronEntry) -> DialReply | None:
        known = self._known.get(entry.name)
        if self._broker is None or known is None or known.dial_key is None:
            return None
        return DialReply(port=self._broker.port, tls=self._broker.tls, key=known.dial_key)

    def _accept(self, entry: NeuronEntry, process: str | None, until: float) -> None:
        """Most announcements only renew: these must cost little, because each neuron sends one all the time."""
        known, key = self._known.get(entry.name), None
        if urlsplit(entry.endpoint).scheme == DIAL:
            if known is not None and process is not None and known.process == process:
                key = known.dial_key
            key = key or secrets.token_urlsafe()
        if known is not None and known.entry == entry:
            self._known[entry.name] = Registered(known.entry, process, until, key)
            if key != known.dial_key:
                self._tell_broker()
            if key != known.dial_key or self._clock() - self._kept_at > KEEP_SECS:
                self._keep()
            if until < known.expires_at:
                self._changed.set()
            return
        for name in [name for name, each in self._known.items() if each.entry.endpoint == entry.endpoint]:
            if name != entry.name:
                log.warning("neuron %s at %s is now called %s", name, entry.endpoint, entry.name)
                del self._known[name]
        if known is None:
            log.info("neuron %s at %s has registered", entry.name, entry.endpoint)
        self._refused.pop(entry.name, None)
        self._known[entry.name] = Registered(entry, process, until, key)
        self._tell()
        self._changed.set()

    async def run(self) -> None:
        """Removes neurons whose registration has expired. Never returns."""
        while True:
            self._changed.clear()
            self._expire()
            due = min((each.expires_at for each in self._known.values()), default=None)
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(None if due is None else max(due - self._clock(), 0)):
                    await self._changed.wait()

    def _expire(self) -> None:
        now = self._clock()
        expired = [name for name, each in self._known.items() if each.expires_at <= now]
        for name in expired:
            if name not in self._membership.listed:  # else it stays in the fleet, and needs no registration
                log.warning("neuron %s is removed: it has missed three registrations", name)
            del self._known[name]
            self._refused.pop(name, None)
        if expired:
            self._tell()

    def _tell_broker(self) -> None:
        if self._broker is not None:
            self._broker.use({name: each.dial_key for name, each in self._known.items() if each.dial_key is not None})

    def _tell(self) -> None:
        self._keep()
        self._tell_broker()
        self._membership.use_found(each.entry for each in self._known.values())

    def _keep(self) -> None:
        """Not at each renewal: the file is written whole."""
        now, wall = self._clock(), time.time()
        self._kept_at = now
        self._state.set_registrations(
            KeptRegistration(
                name=name,
                endpoint=each.entry.endpoint,
                token=each.entry.token,
                process=each.process,
                dial_key=each.dial_key,
                expires_at=wall + each.expires_at - now + KEEP_SECS,
            )
            for name, each in self._known.items()
        )
