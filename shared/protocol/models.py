"""What a neuron says of a model."""

from __future__ import annotations

from enum import Enum

from pydantic import Field

from shared.protocol.base import IndexList, Mib, WireModel
from shared.protocol.commands import EndpointReply


class ModelStatus(str, Enum):
    """The statuses of the contract. On the wire a status is a plain string: one that is not here is not servable."""

    LOADED = "loaded"
    LOADING = "loading"
    UNLOADED = "unloaded"
    RELOADING = "reloading"
    RECOVERING = "recovering"
    SLEEPING = "sleeping"
    FAILED = "failed"

    @classmethod
    def known(cls, text: str) -> ModelStatus | None:
        """The status named `text`, or None when this version does not know it."""
        try:
            return cls(text)
        except ValueError:
            return None

    @property
    def coming(self) -> bool:
        """True while the engine is on its way up: requests wait, nothing is placed elsewhere."""
        return self in (ModelStatus.LOADING, ModelStatus.RELOADING, ModelStatus.RECOVERING)


class Progress(WireModel):
    """How far a load is. `fraction` is of the current phase, 0 to 1, None when the engine does not say.

    `overall` is of the whole load, 0 to 1, never falling, None when there is nothing to tell it from.
    `remaining_secs` is an estimate from earlier loads on that host, more than 0, None without one.
    """

    phase: str = ""
    fraction: float | None = None
    message: str | None = None
    elapsed_secs: float | None = None
    phase_elapsed_secs: float | None = None
    overall: float | None = None
    remaining_secs: float | None = None


class Transition(WireModel):
    """A change of a model's state: what it became, when (Unix time), and why."""

    state: str
    at: float
    reason: str


class ModelView(WireModel):
    """One entry of `GET /models`. `since` is Unix time of the last change of status.

    What a neuron of the seed protocol does not tell is None. `state` is as `status`, but exact, and `reason` why it is
    so; `cause` is whose doing a failure is (`FailureCause`); `retry_at` (Unix time) is when a model that recovers is
    started again. `vram_booked_mb` is what is booked for it on all its devices together, `slept_mb` what a sleeping
    model takes of the host's memory. `endpoint` is where a loaded model answers, as in `GET /models/{id}/endpoint`.
    """

    id: str
    harness: str | None = None
    status: str
    devices: IndexList = Field(default_factory=list)
    vram_used_mb: Mib | None = None
    progress: Progress | None = None
    error: str | None = None
    since: float | None = None
    tensor_parallel: int | None = None
    state: str | None = None
    reason: str | None = None
    cause: str | None = None
    retry_at: float | None = None
    vram_booked_mb: Mib | None = None
    slept_mb: Mib | None = None
    endpoint: EndpointReply | None = None

    @property
    def known_status(self) -> ModelStatus | None:
        return ModelStatus.known(self.status)
