"""Requests of cortex to a neuron, and their replies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shared.protocol.base import Mib, NameList, Text, WireModel
from shared.protocol.context_length import ContextLength
from shared.protocol.group import GroupPart
from shared.protocol.parallel import Parallelism

ENGINE_KEYS_HEADER = "x-cortex-engine-keys"
"""Request header of a caller that sends an engine the `api_key` of its endpoint. A request without it comes from a
caller that speaks only protocol v1, which has no keys."""
MAX_VRAM_MB = 1 << 40
MAX_DRAIN_SECS = 3600.0
"""The longest `drain_secs` of an unload."""
LEASE_SECS = 5.0
"""How long a lease on a load lasts unless it is renewed."""
MAX_MODEL_ID_CHARS = 512
MAX_LORAS = 1000
MAX_LORA_RANK = 512
"""The highest rank of a LoRA adapter that vLLM can serve."""
ModelId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_MODEL_ID_CHARS)]
FIRST_INSTANCE = "0"
"""The instance that a load without `instance` makes when the neuron has none of the model."""
InstanceName = Annotated[Text, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Names one engine of a model on its neuron."""


class WantedModel(WireModel):
    """A model to load, and how: what a load command and an entry of `[[default_models]]` say.

    A body with only `model_id` repeats the spec of an earlier load. `parallel`, if given, says how the model is split;
    its `tensor` is `tensor_parallel`. `instance` None means any that has this spec. `max_lora_rank` None leaves it to
    the neuron, which looks at `lora_sources`.
    """

    model_id: ModelId
    """What clients ask for."""
    instance: InstanceName | None = None
    """Names one of several [engines of the same model](protocol.md#what-is-an-instance) on this host: give each entry
    of the model its own. Default: the first."""
    variant: str | None = None
    """A label that `GET /models` shows. Default: none."""
    harness: str | None = None
    """One of `[[harnesses]]`. Default: the first of them."""
    quant: str | None = None
    """Passed on as `--quantization`. Default: what the model's files say."""
    tensor_parallel: int | None = Field(default=None, ge=1, le=64)
    """Number of GPUs it is split over. Default: one, or as many as `devices` lists."""
    parallel: Parallelism | None = None
    devices: list[int] | None = None
    """GPU indices, in the order of the ranks; `[]`: none, it runs on the CPU. Default: neuron chooses."""
    source: str | None = None
    """What the engine loads: an absolute path, or a hub name. Default: `model_id`."""
    args: NameList = Field(default_factory=list)
    """Further engine arguments. Default: none."""
    vram_mb: Mib | None = Field(default=None, ge=1, le=MAX_VRAM_MB)
    """MiB on all its devices together: booked, and the engine's share of each GPU. A load that does not fit is refused.
    Default: what the model's files say it needs; without complete files the engine's own default (vLLM: 92% of each
    GPU)."""
    max_model_len: ContextLength = None
    """Tokens of context, or `"auto"`, as in models.toml. Default: as the engine decides."""
    served_names: NameList = Field(default_factory=list)
    """Names it answers to besides `model_id`. Default: none."""
    tools: bool | None = None
    """Whether clients may offer it tools, as in models.toml. Default: `false`."""
    max_loras: int | None = Field(default=None, ge=1, le=MAX_LORAS)
    """How many LoRA adapters its engine can have at a time. Default: none."""
    max_lora_rank: int | None = Field(default=None, ge=1, le=MAX_LORA_RANK)
    """The highest rank of an adapter. Default: that of `lora_sources`, or else the engine's (vLLM: 16)."""
    lora_sources: NameList = Field(default_factory=list)
    """Directories or hub names of the adapters that may come; if all are directories on this host, neuron reads their
    ranks. Default: none."""


class LoadCommand(WantedModel):
    """Body of `POST /models/load`.

    `group`: the engine spans several neurons, and this is one part of it. `parallel` then describes the whole engine,
    `devices` and `vram_mb` this part.
    """

    group: GroupPart | None = None

    @property
    def bare(self) -> bool:
        """True if the body only names a model, or an instance of it."""
        return not self.model_dump(exclude={"model_id", "instance"}, exclude_defaults=True)

    def body(self) -> dict[str, Any]:
        """As JSON: a bare command has only names, and fields of later versions are there only if they are given."""
        later = ("parallel", "instance", "variant", "group", "max_model_len", "max_loras", "max_lora_rank")
        left_out = {name for name in later if getattr(self, name) is None}
        if not self.lora_sources:
            left_out.add("lora_sources")
        return self.model_dump(mode="json", exclude_defaults=self.bare, exclude=left_out)


class UnloadCommand(WireModel):
    """Body of `POST /models/unload`. `instance` None: every instance of the model."""

    model_id: ModelId
    instance: InstanceName | None = None


class SleepCommand(WireModel):
    """Body of `POST /models/sleep`. Level 1, the only one supported, moves the weights to host memory.
    `instance` None: every instance of the model."""

    model_id: ModelId
    instance: InstanceName | None = None
    level: Literal[1] = 1


class WakeCommand(WireModel):
    """Body of `POST /models/wake`. `instance` None: every instance of the model."""

    model_id: ModelId
    instance: InstanceName | None = None


class AdapterCommand(WireModel):
    """Body of `POST /adapters/load` and `POST /adapters/unload`: the LoRA adapter `adapter` of an engine of the model
    `model_id`. `instance` None: of every engine of the model.

    For a load: `source` is the adapter's directory, or its name on a hub. `displaceable` are adapters that may be
    unloaded for it if the engine has as many as it can have, the first before the others. One that has requests stays.
    """

    model_id: ModelId
    adapter: ModelId
    instance: InstanceName | None = None
    source: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None
    displaceable: NameList = Field(default_factory=list)


class AdapterReply(WireModel):
    """Reply to the load or unload of an adapter: the adapters of the engine now, by instance."""

    model_id: str
    adapters: dict[str, list[str]] = Field(default_factory=dict)


class LeaseCommand(WireModel):
    """Body of `POST /models/lease`. `holder` identifies the cortex, `node` the neuron that is to load the model, for
    all cortexes: its `instance_id`, or its URL if it has none. None ends the lease."""

    model_id: ModelId
    holder: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    node: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None


class LeaseReply(WireModel):
    """Reply to `POST /models/lease`. `node`: where another cortex loads the model; if the lease is `granted`, where one
    has loaded it, or failed to, a moment ago. `nodes`: all of them, if it loads several instances."""

    granted: bool
    node: str | None = None
    nodes: list[str] = Field(default_factory=list)


class LogsReply(WireModel):
    """Answer of `GET /models/{model_id}/logs`: the last lines of its engines."""

    lines: list[str] = Field(default_factory=list)


class EndpointReply(WireModel):
    """Reply to `GET /models/{id}/endpoint`: the engine's base URL, and its bearer token."""

    url: str
    api_key: str | None = None


class LoadReply(WireModel):
    """Reply to load, unload, sleep and wake: the status reached, or with 202 the target status. `url` and `api_key`:
    the endpoint of a loaded model, `instance` the one that was loaded."""

    status: str
    model_id: str | None = None
    instance: str | None = None
    url: str | None = None
    api_key: str | None = None

    @property
    def endpoint(self) -> EndpointReply | None:
        return None if self.url is None else EndpointReply(url=self.url, api_key=self.api_key)
