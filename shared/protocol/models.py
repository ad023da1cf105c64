"""The state of a model on a neuron."""

from __future__ import annotations

from enum import Enum

from pydantic import Field

from shared.protocol.base import IndexList, Mib, WireModel
from shared.protocol.commands import EndpointReply


class ModelStatus(str, Enum):
    """On the wire a status is a plain string. A model with an unknown status is not servable."""

    LOADED = "loaded"
    LOADING = "loading"
    UNLOADED = "unloaded"
    RELOADING = "reloading"
    RECOVERING = "recovering"
    SLEEPING = "sleeping"
    FAILED = "failed"

    @classmethod
    def known(cls, text: str) -> ModelStatus | None:
        """The status named `text`, or None if unknown."""
        try:
            return cls(text)
        except ValueError:
            return None

    @property
    def coming(self) -> bool:
        """True while the engine starts: requests wait, and cortex does not place the model elsewhere."""
        return self in (ModelStatus.LOADING, ModelStatus.RELOADING, ModelStatus.RECOVERING)


class Progress(WireModel):
    """Progress of a load. `fraction`: of the current phase, 0 to 1, None if unknown.

    `overall`: of the whole load, 0 to 1, never falling, None if unknown. `remaining_secs`: estimated from earlier loads
    on that host, above 0, None if there are none.
    """

    phase: str = ""
    fraction: float | None = None
    message: str | None = None
    elapsed_secs: float | None = None
    phase_elapsed_secs: float | None = None
    overall: float | None = None
    remaining_secs: float | None = None


class Transition(WireModel):
    """A change of a model's state: the new state, its Unix time, and the reason."""

    state: str
    at: float
    reason: str


class ModelView(WireModel):
    """One entry of `GET /models`. `since` is Unix time of the last change of status.

    A protocol v1 neuron omits the fields that default to None. `state` is a finer `status`, with its `reason`. `cause`
    classifies a failure (`FailureCause`). `retry_at`: Unix time of the next start of a recovering model.
    `permanent`: true for a failure that another start there would not heal.
    `vram_booked_mb`: reserved on all its devices together. `slept_mb`: host memory of a sleeping model.
    `endpoint`: where a loaded model answers, as in `GET /models/{id}/endpoint`.
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
    permanent: bool | None = None
    vram_booked_mb: Mib | None = None
    slept_mb: Mib | None = None
    endpoint: EndpointReply | None = None

    @property
    def known_status(self) -> ModelStatus | None:
        return ModelStatus.known(self.status)
