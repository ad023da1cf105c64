"""An engine that spans several neurons."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from shared.protocol.base import WireModel
from shared.protocol.parallel import MAX_DEVICES, Parallelism

GroupId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:_-]{0,254}$")]
"""A name or an address, without brackets."""
Port = Annotated[int, Field(ge=1, le=65535)]


class GroupPart(WireModel):
    """One neuron's part of an engine that spans `size` neurons. `id` names the group, the same in all parts.

    The parts are numbered by `rank`: rank 0 takes the requests, and the others find it at `master_addr` and
    `master_port`. Each part has the same number of devices, and their ranks in the engine follow one another.
    """

    id: GroupId
    rank: int = Field(ge=0, lt=MAX_DEVICES)
    size: int = Field(ge=2, le=MAX_DEVICES)
    master_addr: HostName
    master_port: Port

    @model_validator(mode="after")
    def _rank_exists(self) -> GroupPart:
        if self.rank >= self.size:
            raise ValueError(f"rank {self.rank} of {self.size} parts: ranks are 0 to {self.size - 1}")
        return self

    @property
    def serves(self) -> bool:
        """True for the part that takes the requests."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"part {self.rank} of {self.size} of group {self.id}"


def split_over(parallel: Parallelism, parts: int) -> Parallelism:
    """What each of `parts` neurons has of an engine: its share of the devices, as tensor groups or one of their parts.

    Raises:
        ValueError: it cannot be split evenly, or has copies; the message says what to change.
    """
    if parallel.data > 1:
        raise ValueError(f"{parallel}: an engine that spans neurons has no copies, use data = 1")
    if parallel.devices % parts:
        raise ValueError(f"{parallel}: {parallel.devices} devices cannot be split evenly over {parts} neurons")
    devices = parallel.devices // parts
    tensor = min(parallel.tensor, devices)
    if devices % tensor or parallel.tensor % tensor:
        raise ValueError(
            f"{parallel}: with {devices} devices on each of {parts} neurons, tensor must divide {devices} or be a "
            f"multiple of it"
        )
    return Parallelism(tensor=tensor, pipeline=devices // tensor, expert=parallel.expert)


class ListenCommand(WireModel):
    """Body of `POST /groups/listen`: listen on a port for a check of the network between the neurons of a group. On
    rank 0's neuron the port is then `master_port` of the group."""

    group: GroupId


class ListenReply(WireModel):
    """Where the others can reach this neuron's part."""

    address: HostName
    port: Port


class GroupPeer(ListenReply):
    """Another neuron of a group, and where it listens. `node`: its name, for messages."""

    node: str


class ReachCommand(WireModel):
    """Body of `POST /groups/reach`: connect to each of the peers."""

    group: GroupId
    peers: list[GroupPeer] = Field(min_length=1, max_length=MAX_DEVICES)


class ReachReply(WireModel):
    """Why peers cannot be reached, by `node`; empty if all can."""

    unreachable: dict[str, str] = Field(default_factory=dict)
