"""What a cortex asks of a neuron."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from shared.protocol.base import Mib, WireModel


def _listed(value: object) -> object:
    return [] if value is None else value


StringList = Annotated[list[str], BeforeValidator(_listed)]
MAX_VRAM_MB = 1 << 40
ModelId = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class LoadCommand(WireModel):
    """Body of `POST /models/load`.

    `model_id` is what clients ask for; `source`, when given, what the engine is told to load. `tensor_parallel` None
    means one device. `devices` None lets the neuron choose. `vram_mb` (MiB, all devices together) is what the engine
    may take and what is reserved; None leaves it to the engine. A body with nothing but `model_id` asks for the spec
    remembered from an earlier load.
    """

    model_id: ModelId
    harness: str | None = None
    quant: str | None = None
    tensor_parallel: int | None = Field(default=None, ge=1, le=64)
    devices: list[int] | None = None
    source: str | None = None
    args: StringList = Field(default_factory=list)
    vram_mb: Mib | None = Field(default=None, ge=1, le=MAX_VRAM_MB)
    served_names: StringList = Field(default_factory=list)

    @property
    def bare(self) -> bool:
        """True when the body names the model and nothing else."""
        return not self.model_dump(exclude={"model_id"}, exclude_defaults=True)


class UnloadCommand(WireModel):
    """Body of `POST /models/unload`."""

    model_id: ModelId


class SleepCommand(WireModel):
    """Body of `POST /models/sleep`. Level 1 moves the weights into the host's memory; there is no other here."""

    model_id: ModelId
    level: Literal[1] = 1


class WakeCommand(WireModel):
    """Body of `POST /models/wake`."""

    model_id: ModelId


class EndpointReply(WireModel):
    """Answer of `GET /models/{id}/endpoint`: the engine's base URL, and the key it wants as a bearer token."""

    url: str
    api_key: str | None = None


class LoadReply(WireModel):
    """Answer of load, unload, sleep and wake: the status reached, or the one being worked towards (202). `url` and
    `api_key` are the engine's endpoint when the model is loaded."""

    status: str
    model_id: str | None = None
    url: str | None = None
    api_key: str | None = None

    @property
    def endpoint(self) -> EndpointReply | None:
        return None if self.url is None else EndpointReply(url=self.url, api_key=self.api_key)
