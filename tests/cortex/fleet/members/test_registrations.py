"""What becomes of announcements, without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from cortex.config.neurons import NeuronEntry
from cortex.config.settings import PollSettings
from cortex.fleet.members.membership import Membership
from cortex.fleet.members.registrations import Registrations
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.upstream.pool import EnginePool
from shared.errors import Conflict
from shared.protocol import Registration
from tests.ports import free_port


def announcement(name: str, endpoint: str) -> Registration:
    return Registration(name=name, endpoint=endpoint, interval_secs=10)


class Registering:
    """A fleet to which neurons announce themselves. `told`: how often the membership was told of a change."""

    def __init__(self, pool: EnginePool) -> None:
        self.now = 0.0
        self.told = 0
        self.fleet = Fleet([], unhealthy_after=3)
        self.membership = Membership(pool, self.fleet)
        self.state = StateFile()
        self.registrations = Registrations(self.membership, self.fleet, self.state, clock=lambda: self.now)
        self._use_found = self.membership.use_found

    def count(self, entries: Iterable[NeuronEntry]) -> None:
        self.told += 1
        self._use_found(entries)

    def endpoints(self) -> dict[str, str]:
        return {name: node.endpoint for name, node in self.fleet.snapshot().nodes.items()}


@pytest.fixture
async def cortex(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Registering]:
    pool = EnginePool(5)
    cortex = Registering(pool)
    monkeypatch.setattr(cortex.membership, "use_found", cortex.count)
    yield cortex
    await cortex.membership.close()
    pool.close()


@pytest.fixture
def endpoint() -> str:
    """Nothing listens there."""
    return f"http://127.0.0.1:{free_port()}"


async def test_a_renamed_neuron_is_one_neuron(cortex: Registering, endpoint: str) -> None:
    """Its GPUs would count twice until the old name expires."""
    cortex.registrations.register(announcement("old", endpoint))
    cortex.registrations.register(announcement("new", endpoint))
    assert cortex.endpoints() == {"new": endpoint}


async def test_a_renewal_changes_nothing(cortex: Registering, endpoint: str) -> None:
    """Each neuron sends one all the time: it must not compare the fleet each time. It still renews."""
    cortex.registrations.register(announcement("a", endpoint))
    assert cortex.told == 1
    cortex.now = 30
    cortex.registrations.register(announcement("a", endpoint))
    cortex.now = 60
    expiring = asyncio.create_task(cortex.registrations.run())
    await asyncio.sleep(0)
    assert cortex.told == 1
    assert cortex.endpoints() == {"a": endpoint}
    expiring.cancel()


async def test_renewals_are_kept_now_and_then(cortex: Registering, endpoint: str) -> None:
    """The state file is written whole; what it has is valid until the next time."""
    cortex.registrations.register(announcement("a", endpoint))
    (first,) = cortex.state.registrations
    cortex.now = 60
    cortex.registrations.register(announcement("a", endpoint))
    assert cortex.state.registrations == [first]
    cortex.now = 61
    cortex.registrations.register(announcement("a", endpoint))
    (second,) = cortex.state.registrations
    assert second is not first
    assert second.expires_at >= first.expires_at


async def test_a_refusal_is_logged_once(cortex: Registering, endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    """The neuron asks again all the time, and its own log has the reason."""
    cortex.membership.configure([NeuronEntry(name="a", endpoint=endpoint)], PollSettings())
    for _ in range(3):
        with pytest.raises(Conflict):
            cortex.registrations.register(announcement("a", "http://127.0.0.1:9"))
    assert caplog.text.count("registration refused") == 1


async def test_a_registered_neuron_that_is_listed_later_is_not_removed(
    cortex: Registering, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does the log say so; it does of another one."""
    cortex.registrations.register(announcement("moved", endpoint))
    cortex.registrations.register(announcement("lost", "http://127.0.0.1:9"))
    cortex.membership.configure([NeuronEntry(name="moved", endpoint=endpoint)], PollSettings())
    cortex.now = 36
    expiring = asyncio.create_task(cortex.registrations.run())
    await asyncio.sleep(0)
    assert cortex.endpoints() == {"moved": endpoint}
    assert "neuron lost is removed" in caplog.text
    assert "neuron moved is removed" not in caplog.text
    expiring.cancel()
