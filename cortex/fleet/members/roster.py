"""Which neurons are in the fleet, and under which names. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cortex.config.neurons import NeuronEntry, is_node_name
from cortex.fleet.snapshot import NodeSnapshot
from shared.protocol import Discovery, Registration

ALLOWED_MISSES = 3.5
"""A registration ends when three announcements have not come and half the time to the fourth has passed."""


def combined(listed: Iterable[NeuronEntry], found: Iterable[NeuronEntry]) -> tuple[dict[str, NeuronEntry], list[str]]:
    """All neurons by name, those of cortex.toml first, and why some that were found are left out. The entry of
    cortex.toml wins, because a found neuron must not take the requests of a listed one, and one host under two names
    would have its memory counted twice."""
    entries = {entry.name: entry for entry in listed}
    names = {entry.endpoint: entry.name for entry in entries.values()}
    clashes = []
    for entry in found:
        listed_as = names.get(entry.endpoint, entry.name)
        if listed_as != entry.name:
            clashes.append(
                f"the neuron found at {entry.endpoint} with the name {entry.name!r} is used under the name that "
                f"cortex.toml gives it: {listed_as!r}"
            )
            continue
        known = entries.setdefault(entry.name, entry)
        if known.endpoint != entry.endpoint:
            clashes.append(
                f"the neuron found at {entry.endpoint} is left out: {entry.name!r} is the name of the one at "
                f"{known.endpoint}; if they are two hosts, give each neuron a name of its own in neuron.toml"
            )
    return entries, clashes


@dataclass(frozen=True)
class FoundAddress:
    """An endpoint that was found, by DNS for example. `name` and `process` (its `instance_id`) are what the neuron
    there has said; `name` is None until it has answered. `seen_at`: when DNS had it last, in monotonic seconds.
    `returned`: DNS had dropped it for a while, and it has not answered since. It may belong to another host now."""

    endpoint: str
    seen_at: float
    name: str | None = None
    process: str | None = None
    returned: bool = False


Addresses = Mapping[str, FoundAddress]
"""By endpoint, in the order in which they were found."""
NO_HINTS: Mapping[str, str] = MappingProxyType({})


def after_lookup(known: Addresses, endpoints: Iterable[str] | None, *, now: float, grace_secs: float) -> Addresses:
    """The addresses after a look-up. One that DNS no longer has stays for `grace_secs`. `endpoints` is None when DNS
    gave no answer: then nothing is known to have left, and those that it had dropped before still count as dropped."""
    last = max((address.seen_at for address in known.values()), default=now)
    if endpoints is None:
        silent = now - last
        return {endpoint: replace(address, seen_at=address.seen_at + silent) for endpoint, address in known.items()}
    seen = dict.fromkeys(endpoints)
    kept = {
        endpoint: replace(address, seen_at=now, returned=address.returned or address.seen_at < last)
        if endpoint in seen
        else address
        for endpoint, address in known.items()
        if endpoint in seen or now - address.seen_at < grace_secs
    }
    return {**kept, **{endpoint: FoundAddress(endpoint, now) for endpoint in seen if endpoint not in kept}}


def to_ask(known: Addresses, nodes: Mapping[str, NodeSnapshot]) -> list[str]:
    """The endpoints whose neuron has to say its name: it has not done so yet, or another process answers there, or may
    do so."""
    changed = {address.name for address in known.values() if _is_another(address, nodes.get(address.name or ""))}
    return [each.endpoint for each in known.values() if each.name is None or each.returned or each.name in changed]


def _is_another(address: FoundAddress, node: NodeSnapshot | None) -> bool:
    """Whether polls of this address have found another process than the one that has said its name."""
    if node is None or node.endpoint != address.endpoint or node.discovery is None:
        return False
    return node.discovery.instance_id != address.process


def after_answers(known: Addresses, answers: Mapping[str, Discovery], hints: Mapping[str, str] = NO_HINTS) -> Addresses:
    """The addresses with what their neurons have said, by endpoint. `hints`: names for those without one."""

    def answered(address: FoundAddress, said: Discovery) -> FoundAddress:
        name = name_of(said, address.endpoint, hints.get(address.endpoint))
        return replace(address, name=name, process=said.instance_id, returned=False)

    return {
        endpoint: answered(address, answers[endpoint]) if endpoint in answers else address
        for endpoint, address in known.items()
    }


def endpoint_of(address: str, port: int, *, tls: bool) -> str:
    """The URL of a neuron at an IP address."""
    return f"{'https' if tls else 'http'}://{f'[{address}]' if ':' in address else address}:{port}"


def name_of(discovery: Discovery, endpoint: str, hint: str | None = None) -> str:
    """The name of a found neuron: that of its neuron.toml, else the hint, else its host's, else its address."""
    for name in (discovery.name, hint, discovery.hostname):
        if name and is_node_name(name):
            return name
    plain = endpoint.partition("//")[2]
    return "".join(character if character.isalnum() or character == "." else "-" for character in plain).strip("-")


def named(known: Addresses) -> tuple[list[FoundAddress], list[str]]:
    """One address for each name, and why others are left out. Several addresses of one process are the same neuron, for
    example over IPv4 and IPv6. Of two neurons that give the same name the one that DNS still has wins, and one that has
    confirmed it."""
    chosen: dict[str, FoundAddress] = {}
    clashes = []
    best_first = sorted(known.values(), key=lambda each: (each.returned, -each.seen_at))  # stable: else as found
    for address in best_first:
        if address.name is None:
            continue
        other = chosen.setdefault(address.name, address)
        if other.process != address.process and other.seen_at == address.seen_at and not address.returned:
            clashes.append(
                f"the neuron found at {address.endpoint} is left out: the one at {other.endpoint} also gives the name "
                f"{address.name!r}; give each neuron a name of its own in neuron.toml"
            )
    order = list(known)
    return sorted(chosen.values(), key=lambda each: order.index(each.endpoint)), clashes


@dataclass(frozen=True)
class Registered:
    """A neuron that has announced itself. `expires_at`: monotonic seconds. `dial_key` is what its connections must
    show, None if cortex connects to it."""

    entry: NeuronEntry
    process: str | None
    expires_at: float
    dial_key: str | None = None


def registration_refusal(
    wanted: Registration,
    *,
    listed: Mapping[str, NeuronEntry],
    registered: Mapping[str, Registered],
    node: NodeSnapshot | None,
    connected: bool = False,
) -> str | None:
    """Why a neuron must not have the name that it announces; None if it may. `node` is what is known of the neuron
    that has this name now. Another endpoint takes the name over once the neuron at the old one no longer answers, and
    another process that dials once that one is no longer `connected`."""
    if wanted.name in listed:
        if listed[wanted.name].endpoint == wanted.endpoint:
            return None
        return (
            f"{wanted.name!r} is listed in cortex.toml with the endpoint {listed[wanted.name].endpoint}: remove it "
            "there, or give this neuron another name"
        )
    other = registered.get(wanted.name)
    if other is None or (wanted.instance_id is not None and wanted.instance_id == other.process):
        return None  # the same process, perhaps under another address
    if other.entry.endpoint == wanted.endpoint and (other.dial_key is None or not connected):
        return None
    if node is None or not node.healthy:
        return None
    return (
        f"{wanted.name!r} is the name of another neuron, at {other.entry.endpoint}, which answers: give this one a "
        "name of its own in neuron.toml"
    )


def registered_until(wanted: Registration, now: float) -> float:
    """When a registration ends without another one, in monotonic seconds."""
    return now + ALLOWED_MISSES * wanted.interval_secs
