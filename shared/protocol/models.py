"""The state of a model on a neuron."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from shared.protocol.base import READ_ONLY, IndexList, Mib, NameList, Text, Tokens, WireModel
from shared.protocol.commands import EndpointReply, InstanceName
from shared.protocol.group import GroupPart
from shared.protocol.parallel import Parallelism


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
        """The status named `text` in any case, or None if unknown."""
        return _STATUSES.get(text) or _STATUSES.get(text.strip().lower())

    @property
    def coming(self) -> bool:
        """True while the engine starts: requests wait, and cortex does not place the model elsewhere."""
        return self in (ModelStatus.LOADING, ModelStatus.RELOADING, ModelStatus.RECOVERING)


_STATUSES = {status.value: status for status in ModelStatus}  # faster than the enumeration's own lookup


class Progress(WireModel):
    """Progress of a load. `fraction`: of the current phase, 0 to 1, None if unknown.

    `overall`: of the whole load, 0 to 1, never falling, None if unknown. `remaining_secs`: estimated from earlier loads
    on that host, above 0, None if there are none. `idle_secs`: for how long the load has done nothing, once that is
    long; None while it works.
    """

    phase: str = ""
    fraction: float | None = None
    message: str | None = None
    elapsed_secs: float | None = None
    phase_elapsed_secs: float | None = None
    overall: float | None = None
    remaining_secs: float | None = None
    idle_secs: float | None = None


class Transition(WireModel):
    """A change of a model's state: the new state, its Unix time, and the reason."""

    state: str
    at: float
    reason: str


class ServedLimit(WireModel):
    """What the neuron can serve of a model, in tokens: prompt and answer together, prompt, answer."""

    context: Tokens | None = None
    input: Tokens | None = None
    output: Tokens | None = None


Price = Annotated[float, Field(ge=0)]


class TokenCost(WireModel):
    """Prices in US dollars per million tokens, as in models.dev."""

    input: Price | None = None
    output: Price | None = None
    cache_read: Price | None = None
    cache_write: Price | None = None


class Modalities(WireModel):
    """What a model reads and writes: "text", "image" and the like."""

    input: NameList = Field(default_factory=list)
    output: NameList = Field(default_factory=list)


class Servability(WireModel):
    """Whether a loaded model can answer now, and if not, why."""

    ok: bool
    reason: str | None = None
    detail: str | None = None


def _as_table(value: Any) -> Any:
    return value if isinstance(value, dict) else {"ok": value}


class ModelFacts(WireModel):
    """What a neuron tells of a model itself, None if nothing. helexa's neuron does; ours tells none of it and must not
    send null, which helexa's cortex does not accept."""

    limit: ServedLimit | None = READ_ONLY
    cost: TokenCost | None = READ_ONLY
    capabilities: list[str] | None = READ_ONLY
    modalities: Modalities | None = READ_ONLY
    attachment: bool | None = READ_ONLY
    reasoning: bool | None = READ_ONLY
    structured_output: bool | None = READ_ONLY
    temperature: bool | None = READ_ONLY
    tool_call: bool | None = READ_ONLY


class ModelView(ModelFacts):
    """One entry of `GET /models`. `since` is Unix time of the last change of status.

    A protocol v1 neuron omits the fields that default to None. `instance`: the engine's name among those of the model
    on that neuron; a neuron that sends none has one engine for each model. `variant`: the label of the load. `state` is
    a finer `status`, with its `reason`. `cause` classifies a failure (`FailureCause`). `retry_at`: Unix time of the
    next start of a recovering model.
    `permanent`: true for a failure that another start there would not heal.
    `parallel`: how it is split over its devices, None if `tensor_parallel` says all. `group`: it is one part of an
    engine that spans several neurons.
    `vram_booked_mb`: reserved on all its devices together. `ram_used_mb`, `ram_booked_mb`: the host's RAM that its
    processes use and that is reserved for it; None where it is not counted. `slept_mb`: host memory of a sleeping
    model.
    `endpoint`: where a loaded model answers, as in `GET /models/{id}/endpoint`. `engine_version`: of its engine's
    program, None if that is not known. `max_model_len`: the tokens of prompt and answer together that its engine
    serves, None until the engine has told. `paths`: what its engine serves; None if that is not known.
    `missing_paths`: paths of OpenAI's and Anthropic's APIs that its engine is known to lack, such as `/v1/messages`.
    `max_loras`: how many LoRA adapters its engine can have, None if it takes none; `adapters`: those that it has.
    `keep_alive_secs`: how long its engine keeps an idle connection open. `servable`: whether a loaded model can answer
    now, also a bare boolean; None means that it can.
    """

    id: Text
    instance: InstanceName | None = None
    variant: Text | None = None
    harness: Text | None = None
    status: Text
    devices: IndexList = Field(default_factory=list)
    vram_used_mb: Mib | None = None
    progress: Progress | None = None
    error: str | None = None
    since: float | None = None
    tensor_parallel: int | None = None
    parallel: Parallelism | None = None
    group: GroupPart | None = None
    state: str | None = None
    reason: str | None = None
    cause: str | None = None
    retry_at: float | None = None
    permanent: bool | None = None
    vram_booked_mb: Mib | None = None
    ram_used_mb: Mib | None = None
    ram_booked_mb: Mib | None = None
    slept_mb: Mib | None = None
    endpoint: EndpointReply | None = None
    engine_version: Text | None = None
    max_model_len: Tokens | None = None
    paths: NameList | None = None
    missing_paths: NameList = Field(default_factory=list)
    max_loras: int | None = None
    adapters: NameList = Field(default_factory=list)
    keep_alive_secs: float | None = None
    servable: Annotated[Servability, BeforeValidator(_as_table)] | None = READ_ONLY

    @property
    def unservable_because(self) -> str | None:
        """Why it cannot answer now, by its neuron; None if it can."""
        if self.servable is None or self.servable.ok:
            return None
        return ": ".join(filter(None, (self.servable.reason, self.servable.detail))) or "no reason given"

    @property
    def failed_because(self) -> str | None:
        """Why it failed, without its engine's output; None if it has not failed, or if its neuron gives no reason."""
        told = self.error or self.reason
        return told.strip().partition("\n")[0] if told and self.known_status is ModelStatus.FAILED else None

    @property
    def known_status(self) -> ModelStatus | None:
        return ModelStatus.known(self.status)

    @property
    def loaded(self) -> bool:
        return self.status == "loaded" or self.known_status is ModelStatus.LOADED  # the first is fast and usual

    @property
    def servable_now(self) -> bool:
        """It is loaded and takes requests, and its neuron does not say that it cannot answer now."""
        if not self.loaded or (self.group is not None and not self.group.serves):
            return False
        return self.servable is None or self.servable.ok

    @property
    def coming(self) -> bool:
        """Its engine starts."""
        if self.status == "loaded":
            return False
        status = self.known_status
        return status is not None and status.coming

    @property
    def drains(self) -> bool:
        """It takes no new requests, and ends after its present ones. Its status is `unloaded`."""
        return self.state == "draining"

    @property
    def ending(self) -> bool:
        """Its engine takes no new requests and ends. A load of it waits for that and starts the next engine."""
        return self.state in ("draining", "stopping")

    @property
    def holds_devices(self) -> bool:
        """Its engine uses its devices, or will once it has started or woken."""
        return self.loaded or self.coming or self.known_status is ModelStatus.SLEEPING
