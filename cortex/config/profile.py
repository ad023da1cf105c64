"""One model of models.toml: what it needs, how it may run, and how many instances of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field, PrivateAttr, StringConstraints, ValidationInfo, field_validator, model_validator

from cortex.config.model_tables import (
    ComputeCapability,
    ModelLimit,
    ModelName,
    Replicas,
    Variant,
    no_devices,
    same_tensor_size,
    with_tensor_size,
)
from cortex.config.prices import ModelPrices
from shared.protocol import Parallelism
from shared.protocol.commands import MAX_LORA_RANK, MAX_LORAS
from shared.protocol.context_length import ContextLength
from shared.protocol.parallel import MAX_DEVICES, ParallelSettings
from shared.protocol.reserved_arguments import CONTEXT_FLAG, sets_context
from shared.settings import SettingsModel

DEFAULT_PRIORITY = 100
DEFAULT_PINNED_PRIORITY = 1000
AUTO_TOOL_CHOICE = b"--enable-auto-tool-choice"
"""In vLLM's refusal of a request with tools, and in the arguments that prevent it."""
TOOLS_HINT = (
    "set tools = true for this model in models.toml and load it again (or put --enable-auto-tool-choice "
    "--tool-call-parser NAME into its args)"
)


class RequestedModel(NamedTuple):
    """What a client's name for a model stands for. `variant`: only that one; None for any."""

    model_id: str
    variant: str | None = None

    @property
    def name(self) -> str:
        """The id, with the variant if there is one, as in `id@variant`."""
        return self.model_id if self.variant is None else f"{self.model_id}@{self.variant}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names in requests that an engine of it serves: the id, and `id@variant`."""
        return (self.model_id,) if self.variant is None else (self.model_id, self.name)


_OF_DEVICES = ("min_devices", "parallel", "span_nodes", "min_device_vram_mb", "min_compute_capability")
"""Keys that only mean something for a model that runs on devices."""
_OF_AN_ADAPTER = frozenset({"id", "base", "lora", "limit", "prices"})


def _lora_source(value: str | None) -> str | None:
    if value is not None and value.startswith((".", "~")):
        raise ValueError(f"{value!r} is a relative path: give the absolute path on the neurons' hosts, or a hub id")
    return value


_OF_A_VARIANT: Final = {"variant": True}
"""Context of the validation of a variant's profile: what was checked of the whole model holds for it."""


class ModelProfile(SettingsModel):
    """One model of the catalogue. Memory in MiB; models.example.toml documents the defaults.

    With `variants`, only its `choices` say how an engine runs. With `base` it is a LoRA adapter of that model, with the
    weights `lora`, and the engine runs as the base says.
    """

    id: ModelName
    """What clients put into `model`; no white space; unique."""
    harness: str = "vllm"
    """The kind of engine; only hosts that offer it are considered."""
    quant: str | None = None
    """Quantisation, passed on as `--quantization`. Default: what the model's files say."""
    vram_mb: int | None = Field(default=None, gt=0)
    """Footprint of the whole model in MiB, all devices together. It is reserved while the model loads, ranks hosts by
    room, and becomes the engine's share of each GPU. It never rules a host out, but a neuron refuses a load that does
    not fit at that moment. Default: nothing is reserved here; the neuron books what the model's files say it needs,
    otherwise the engine's default (vLLM: 92% of each GPU)."""
    devices: int | None = None
    """`0`: the model runs on the CPU, and `vram_mb` is the RAM it needs ([memory.md](memory.md)). Not with
    `min_devices`, `parallel`, `span_nodes`, `min_device_vram_mb` or `min_compute_capability`. Default: it runs on
    GPUs."""
    min_devices: int = Field(default=1, ge=1, le=MAX_DEVICES)
    """GPUs of one host that the model is split over: the tensor-parallel size, short for `parallel.tensor`."""
    parallel: ParallelSettings | None = None
    span_nodes: bool = False
    """`true`: these GPUs may be on several hosts, if no single host has room ([spanning.md](spanning.md))."""
    min_device_vram_mb: int | None = Field(default=None, gt=0)
    """Total memory that each of these GPUs must have, in MiB. This does rule hosts out. Default: any GPU will do."""
    min_compute_capability: ComputeCapability | None = None
    """The compute capability that each of these GPUs must have, such as `"8.9"` for FP8 on an RTX 4090. This rules
    hosts out too; so does a GPU that does not report one. Default: any GPU will do."""
    pinned_on: tuple[str, ...] = ()
    """The only neurons that may hold the model; it is never evicted there. Default: any neuron."""
    residency_priority: int = DEFAULT_PRIORITY
    """A model is evicted only for one of equal or higher priority. Default: `100`; `1000` with `pinned_on`."""
    replicas: Replicas = Replicas()
    min_residency_secs: float | None = Field(default=None, ge=0)
    """As in `[placement]`, for this model. Default: what `[placement]` says."""
    idle_ttl_secs: float | None = Field(default=None, gt=0)
    """Unload the model after this long without a request, down to `replicas.min`. Default: it stays until its memory is
    needed."""
    when_idle: Literal["unload", "sleep"] = "unload"
    """`"unload"`, or `"sleep"`: on eviction the model moves to host memory if its neuron supports it
    ([sleep](configuration.md#sleep)), and wakes from there in a second or two; elsewhere it is unloaded."""
    source: str | None = None
    """What the engine loads: an absolute path on the GPU host, or a hub name. Default: `id`."""
    args: tuple[str, ...] = ()
    """Further engine arguments, except those that neuron [sets itself](configuration.md#harnessname). Default: none."""
    max_model_len: ContextLength = None
    """Tokens of prompt and answer together that the engine serves, or `"auto"`: the longest context that [fits on the
    card](configuration.md#which-context-fits). Instead of `--max-model-len` in `args`. Default: as the engine decides
    (vLLM: the model's own context, and no start if that does not fit)."""
    tools: bool = False
    """Whether clients may offer the model tools, as every coding agent does: neuron adds `--enable-auto-tool-choice`,
    `--tool-call-parser` and, for families that think, `--reasoning-parser`
    ([which?](configuration.md#which-models-can-use-tools)). Default: `false`: vLLM refuses such requests."""
    limit: ModelLimit | None = None
    prices: ModelPrices | None = None
    base: ModelName | None = None
    """This entry is a [LoRA adapter](configuration.md#how-are-lora-adapters-served) of the model with this id. Only
    with `id`, `lora`, `limit` and `prices`. Default: it is a model of its own."""
    lora: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None
    """The adapter's weights: an absolute path on the GPU hosts, or a hub name. Default: required with `base`."""
    max_loras: int | None = Field(default=None, ge=1, le=MAX_LORAS)
    """How many adapters an engine of this model can have at a time. Default: `4` if the model has adapters; otherwise
    its engines take none."""
    max_lora_rank: int | None = Field(default=None, ge=1, le=MAX_LORA_RANK)
    """The highest rank of an adapter, at most 512. Default: that of the adapters on the host, if none is a hub name;
    otherwise the engine's (vLLM: 16)."""
    variants: tuple[Variant, ...] = ()
    _variant: str | None = PrivateAttr(default=None)
    _place: int = PrivateAttr(default=0)
    _part: bool = PrivateAttr(default=False)

    _tensor_size_of_either = model_validator(mode="before")(with_tensor_size)
    _one_tensor_size = field_validator("parallel")(same_tensor_size)
    _no_devices = field_validator("devices")(no_devices)

    @model_validator(mode="before")
    @classmethod
    def _pinned_models_rank_high(cls, data: object) -> object:
        if isinstance(data, Mapping) and data.get("pinned_on") and "residency_priority" not in data:
            return {**data, "residency_priority": DEFAULT_PINNED_PRIORITY}
        return data

    _no_relative_path = field_validator("lora")(_lora_source)

    @model_validator(mode="after")
    def _adapter_or_model(self) -> ModelProfile:
        if self.base is None and self.lora is not None:
            raise ValueError("base: required with lora, the id of the model that the adapter belongs to")
        if self.base is None:
            return self
        if self.lora is None:
            raise ValueError("lora: required with base, the adapter's directory or its name on the hub")
        others = sorted(self.model_fields_set - _OF_AN_ADAPTER)
        if others:
            raise ValueError(
                f"base: an adapter runs on the engine of {self.base!r}, whose entry says how: remove "
                f"{' and '.join(others)} here"
            )
        return self

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Each variant gets its name: by default its `quant`, or else its number."""
        if not isinstance(value, (list, tuple)):
            return value
        return [
            {**each, "name": quant if isinstance(quant := each.get("quant"), str) else str(number)}
            if isinstance(each, Mapping) and each.get("name") is None
            else each
            for number, each in enumerate(value, 1)
        ]

    @field_validator("variants")
    @classmethod
    def _distinct_names(cls, value: tuple[Variant, ...]) -> tuple[Variant, ...]:
        seen: set[str | None] = set()
        for each in value:
            if each.name in seen:
                raise ValueError(f"two variants are named {each.name!r}: give each a `name` of its own")
            seen.add(each.name)
        return value

    @model_validator(mode="after")
    def _can_span(self, info: ValidationInfo) -> ModelProfile:
        spans = self.span_nodes and info.context is not _OF_A_VARIANT
        if spans and all(choice.device_count < 2 for choice in self.choices):
            raise ValueError("span_nodes: a model on one device has nothing to spread, set min_devices or parallel")
        if spans and any(choice.parallelism.data > 1 for choice in self.choices):
            raise ValueError("span_nodes: an engine that spans hosts has no copies, use replicas instead of data")
        return self

    @model_validator(mode="after")
    def _on_the_cpu_or_on_devices(self) -> ModelProfile:
        tables: tuple[ModelProfile | Variant, ...] = (self, *self.variants)
        for table in tables:
            both = sorted(table.model_fields_set.intersection(_OF_DEVICES)) if table.devices == 0 else []
            if both:
                raise ValueError(f"devices: a model with devices = 0 runs on the CPU, remove {' and '.join(both)}")
        return self

    @model_validator(mode="after")
    def _one_context_length(self, info: ValidationInfo) -> ModelProfile:
        choices = () if info.context is _OF_A_VARIANT else self.choices
        if any(choice.max_model_len is not None and sets_context(choice.args) for choice in choices):
            raise ValueError(f"max_model_len: {CONTEXT_FLAG} is in args too, remove one of them")
        return self

    @cached_property  # as the next two: pydantic takes long to find a private attribute
    def variant(self) -> str | None:
        """The name of the variant that this is one of the `choices` for; None for a model itself."""
        return self._variant

    @cached_property
    def place(self) -> int:
        """The place of this variant among those of the model, from 0, the best."""
        return self._place

    @cached_property
    def requested(self) -> RequestedModel:
        """What it is: the model, or one variant of it."""
        return RequestedModel(self.id, self._variant)

    @property
    def choices(self) -> tuple[ModelProfile, ...]:
        """How an engine of it may run, best first: one profile for each variant, or this one without variants."""
        return self._of_variants or (self,)

    @cached_property
    def _of_variants(self) -> tuple[ModelProfile, ...]:
        return tuple(self._with(variant, place) for place, variant in enumerate(self.variants))

    @property
    def variants_text(self) -> str:
        """The names of its variants, for people."""
        names = ", ".join(str(each.name) for each in self.variants)
        return f"{self.id!r} has the variants {names}" if names else f"{self.id!r} has no variants"

    def choice(self, variant: str | None) -> ModelProfile | None:
        """The profile of the variant; for a model without variants itself. None if there is none of that name."""
        return next((each for each in self.choices if each.variant == variant), None)

    def _with(self, variant: Variant, place: int) -> ModelProfile:
        given = variant.model_dump(exclude_none=True, exclude={"name"})
        own = self.model_dump(exclude_none=True, exclude_unset=True, exclude={"variants"})
        if given.get("devices") == 0:
            own = {key: value for key, value in own.items() if key not in _OF_DEVICES}
        elif not given.keys().isdisjoint(_OF_DEVICES):
            own.pop("devices", None)
        if not given.keys().isdisjoint(("parallel", "min_devices")):
            own = {key: value for key, value in own.items() if key not in ("parallel", "min_devices")}
        found = ModelProfile.model_validate({**own, **given}, context=_OF_A_VARIANT)
        found._variant, found._place = variant.name, place
        return found

    def part(self, parallel: Parallelism) -> ModelProfile:
        """What one host holds of it, split over that host's devices in this way."""
        own = self.model_dump(exclude_none=True, exclude={"parallel", "min_devices", "vram_mb", "span_nodes"})
        memory = {"vram_mb": self.device_share_mb * parallel.devices} if self.device_share_mb else {}
        found = ModelProfile.model_validate({**own, **memory, "parallel": parallel.model_dump()})
        found._variant, found._place, found._part = self._variant, self._place, True
        return found

    @property
    def combines_devices(self) -> bool:
        """Whether its engine uses several devices together, those of other hosts included."""
        return self._part or self.device_count > 1

    @cached_property
    def parallelism(self) -> Parallelism:
        """How it is split: `parallel`, or `min_devices`, its short form."""
        return self.parallel or Parallelism.model_construct(tensor=self.min_devices)

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the host's CPU: its memory is the host's RAM, and it gets no devices."""
        return self.devices == 0

    @cached_property
    def device_count(self) -> int:
        """0 for a model on the CPU."""
        return 0 if self.on_cpu else self.parallelism.devices

    @property
    def shares(self) -> int:
        """In how many parts its memory is split: one for each device, or one in RAM."""
        return max(1, self.device_count)

    @property
    def tensor_parallel(self) -> int | None:
        """The value sent to a neuron; None means a single device."""
        return self.parallelism.tensor if self.parallelism.tensor > 1 else None

    @property
    def serves_as_vllm(self) -> bool:
        """True for vLLM and its simulation, whose arguments and errors are the same."""
        return self.harness in ("vllm", "sim")

    @property
    def refuses_tools(self) -> bool:
        """True if vLLM answers a request with tools with 400."""
        flag = AUTO_TOOL_CHOICE.decode()
        return self.harness == "vllm" and not self.tools and not any(arg.startswith(flag) for arg in self.args)

    @property
    def device_share_mb(self) -> int:
        """What each device must give, or the host's RAM, in MiB; 0 when the footprint is unknown."""
        return 0 if self.vram_mb is None else -(-self.vram_mb // self.shares)
