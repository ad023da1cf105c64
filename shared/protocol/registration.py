"""How a neuron makes itself known to a cortex that does not list it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.protocol.base import WireModel


class Registration(WireModel):
    """Body of cortex's `POST /fleet/register`, which a neuron sends every `interval_secs`. `token` is the bearer token
    that it expects from cortex; `instance_id` as in `Discovery`."""

    name: str
    endpoint: str
    token: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")] | None = None
    instance_id: str | None = None
    interval_secs: float = Field(default=10, ge=0.1, le=3600)


class RegistrationReply(WireModel):
    """`expires_secs`: after this long without another announcement the neuron is removed."""

    name: str
    expires_secs: float
