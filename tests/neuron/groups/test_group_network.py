"""The check of the network between the neurons of a group: real sockets on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from neuron.config import GroupSettings
from neuron.lifecycle import group_network
from neuron.lifecycle.group_network import GroupListeners, link_mbps, unreachable
from shared.errors import ServiceError
from shared.protocol import GroupPart, GroupPeer
from tests.neuron.neurons import until


def settings(**given: object) -> GroupSettings:
    return GroupSettings.model_validate(given)


def part(rank: int, address: str = "127.0.0.1") -> GroupPart:
    return GroupPart(id="g", rank=rank, size=2, master_addr=address, master_port=21000)


def peer(port: int, node: str = "far") -> GroupPeer:
    return GroupPeer(node=node, address="127.0.0.1", port=port)


async def test_a_listening_neuron_is_reached() -> None:
    listeners = GroupListeners(settings())
    at = await listeners.listen("g", "127.0.0.1")
    assert 21000 <= at.port <= 21999
    assert await unreachable("g", [peer(at.port)]) == {}
    listeners.close_all()


async def test_unreachable_peers_are_named_with_the_reason() -> None:
    """A closed port, a peer that listens for another group, a program that says something else or nothing."""
    listeners = GroupListeners(settings())
    at, closed = await listeners.listen("other", "127.0.0.1"), await listeners.listen("g", "127.0.0.1")
    listeners.close("g")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = await unreachable("g", [peer(closed.port, "a"), peer(at.port, "b"), peer(silent.getsockname()[1], "c")])
    assert found == {
        "a": "Connection refused",
        "b": "another program answers there",
        "c": f"no answer within {group_network.REACH_SECS:g} s",
    }
    listeners.close_all()


def free_pair() -> list[int]:
    """Two neighbouring ports that no program uses, other tests included."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            first: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", first + 1))
                return [first, first + 1]


async def test_a_port_is_kept_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of the check and the start of the engine no other group gets the port."""
    monkeypatch.setattr(group_network, "LISTEN_SECS", 1.0)
    ports = free_pair()
    listeners = GroupListeners(settings(port_range=ports))
    first = await listeners.listen("g", "127.0.0.1")
    listeners.close("g")
    second = await listeners.listen("h", "127.0.0.1")
    assert {first.port, second.port} == set(ports)
    with pytest.raises(ServiceError, match=f"no free port in {ports[0]}-{ports[1]}"):
        await listeners.listen("i", "127.0.0.1")

    async def released() -> bool:
        try:
            return (await listeners.listen("i", "127.0.0.1")).port in ports
        except ServiceError:
            return False

    await until(released)  # by time alone
    listeners.close_all()


async def test_two_callers_that_listen_for_one_group_leave_one_port() -> None:
    """The later one counts. The port of the other is closed at once, not after `LISTEN_SECS`."""
    listeners = GroupListeners(settings())
    heard = await asyncio.gather(*(listeners.listen("g", "127.0.0.1") for _ in range(2)))
    found = await unreachable("g", [peer(at.port, str(at.port)) for at in heard])
    assert list(found.values()) == ["Connection refused"]
    listeners.close("g")
    assert len(await unreachable("g", [peer(at.port, str(at.port)) for at in heard])) == 2


async def test_an_address_that_this_host_lacks_is_refused() -> None:
    listeners = GroupListeners(settings(address="203.0.113.7"))
    with pytest.raises(ServiceError, match=r"cannot listen on 203\.0\.113\.7 .*\[group\]") as refused:
        await listeners.listen("g", "127.0.0.1")
    assert refused.value.code == "group_unreachable"


async def test_the_network_of_a_part() -> None:
    """Without configuration: the address of the route to rank 0, and its interface. `[group]` goes first."""
    alone = await GroupListeners(settings()).network_of(part(1))
    assert (alone.address, alone.interface, dict(alone.env)) == ("127.0.0.1", "lo", {})
    for address in ("127.0.0.9", "::1"):
        assert (await GroupListeners(settings()).network_of(part(0, address))).interface == "lo"
    told = settings(address="10.0.0.7", interface="eth7", env={"NCCL_DEBUG": "INFO"})
    network = await GroupListeners(told).network_of(part(1))
    assert (network.address, network.interface, dict(network.env)) == ("10.0.0.7", "eth7", {"NCCL_DEBUG": "INFO"})


@pytest.mark.parametrize(
    ("written", "expected"), [("100000\n", 100_000), ("-1\n", None), ("0\n", None), ("", None), (None, None)]
)
def test_the_speed_of_the_link(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str | None, expected: int | None
) -> None:
    """In Mbit/s, of the interface that the configuration names or that has the address; None if the system does not
    know it."""
    monkeypatch.setattr(group_network, "_INTERFACES", tmp_path)
    for name in ("ib0", "lo"):
        (tmp_path / name).mkdir()
        if written is not None:
            (tmp_path / name / "speed").write_text(written, encoding="ascii")
    assert link_mbps(settings(interface="ib0"), "192.0.2.1") == expected
    assert link_mbps(settings(), "127.0.0.1") == expected
    assert link_mbps(settings(address="127.0.0.1"), "192.0.2.1") == expected
    assert link_mbps(settings(), "192.0.2.1") is None
    assert link_mbps(settings(interface="../x"), "127.0.0.1") is None
