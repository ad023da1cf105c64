"""The neurons at addresses that were found: they are asked for their names."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping

from cortex.config.discovery import DiscoverySettings
from cortex.config.neurons import NODE_NAME_RULE, NeuronEntry, is_node_name
from cortex.fleet.members.membership import Membership
from cortex.fleet.members.roster import NO_HINTS, Addresses, after_answers, after_lookup, name_of, named, to_ask
from cortex.fleet.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.fleet.state import Fleet
from cortex.upstream.pool import EnginePool
from shared.protocol import Discovery
from shared.tasks import timeout

log = logging.getLogger(__name__)

TIMEOUT_SECS = 5.0
"""How long a neuron that is asked for its name may take."""


class FoundNeurons:
    """Owns the addresses, and tells the membership which neurons they are."""

    def __init__(
        self,
        settings: DiscoverySettings,
        membership: Membership,
        fleet: Fleet,
        pool: EnginePool,
        *,
        grace_secs: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`grace_secs`: how long a neuron stays after its address has gone."""
        self._settings = settings
        self._membership = membership
        self._fleet = fleet
        self._pool = pool
        self._grace_secs = grace_secs
        self._clock = clock
        self._known: Addresses = {}
        self._asking: set[str] = set()
        self._said: dict[str, str] = {}  # the last warning about each subject

    async def use(self, endpoints: Iterable[str] | None, hints: Mapping[str, str] = NO_HINTS) -> None:
        """These are there now; None: it is unknown which. Returns when the new ones have said their names, or could
        not. `hints`: names by endpoint, for neurons without one of their own."""
        self._known = after_lookup(self._known, endpoints, now=self._clock(), grace_secs=self._grace_secs)
        self._tell()
        asked = [each for each in to_ask(self._known, self._fleet.snapshot().nodes) if each not in self._asking]
        self._asking.update(asked)
        try:
            answers = await asyncio.gather(*(self._ask(endpoint, hints.get(endpoint)) for endpoint in asked))
        finally:
            self._asking.difference_update(asked)
        said = {endpoint: answer for endpoint, answer in zip(asked, answers, strict=True) if answer is not None}
        self._known = after_answers(self._known, said, hints)
        self._tell()

    def warn(self, subject: str, text: str) -> None:
        """Logs each text once, until the subject has another; "": all is well."""
        if not text:
            self._said.pop(subject, None)
        elif self._said.get(subject) != text:
            log.warning("%s", text)
            self._said[subject] = text

    def _tell(self) -> None:
        found, clashes = named(self._known)
        self.warn("clashes", "; ".join(clashes))
        gone = [subject for subject in self._said if "://" in subject and subject not in self._known]
        for endpoint in gone:
            del self._said[endpoint]
        self._membership.use_found(self._entry(address.endpoint, address.name) for address in found)

    def _entry(self, endpoint: str, name: str | None) -> NeuronEntry:
        known = name or name_of(Discovery(), endpoint)
        return NeuronEntry(name=known, endpoint=endpoint, token=self._settings.bearer_token)

    async def _ask(self, endpoint: str, hint: str | None) -> Discovery | None:
        """What the neuron there says about itself; None without an answer, and it is asked again next time."""
        client = NeuronClient(self._entry(endpoint, None), self._pool)
        try:
            async with timeout(TIMEOUT_SECS):
                answer = await client.discovery()
        except (NeuronUnreachable, NeuronRefused) as error:
            reason = error.reason
        except asyncio.TimeoutError:
            reason = f"no answer within {TIMEOUT_SECS:g} s"
        else:
            self.warn(endpoint, _unusable_name(answer, endpoint, hint))
            return answer
        self.warn(endpoint, f"the neuron found at {endpoint} cannot be used yet: {reason}")
        return None


def _unusable_name(answer: Discovery, endpoint: str, hint: str | None) -> str:
    """A warning about the name that the neuron gives itself; "" if it can be used."""
    if not answer.name or is_node_name(answer.name):
        return ""
    return (
        f"the neuron found at {endpoint} is called {name_of(answer, endpoint, hint)!r} here, because its own name "
        f"{answer.name!r} cannot be used: {NODE_NAME_RULE}; change name in its neuron.toml"
    )
