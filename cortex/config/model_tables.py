"""Tables of a model in models.toml: `limit`, `replicas` and `variants`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from shared.protocol import MAX_MODEL_ID_CHARS
from shared.protocol.context_length import ContextLength
from shared.protocol.parallel import MAX_DEVICES, ParallelSettings
from shared.settings import SettingsModel

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_MODEL_ID_CHARS, pattern=r"^[^\s\x00-\x1f]+$")]
MAX_VARIANT_NAME_CHARS = 64
VariantName = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_VARIANT_NAME_CHARS, pattern=r"^[^\s\x00-\x1f@]+$")
]


def _as_capability(value: Any) -> Any:
    """8.9, 9 and "9" are written as "8.9" and "9.0"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return f"{value}.0" if isinstance(value, str) and value.isdecimal() else value


ComputeCapability = Annotated[str, BeforeValidator(_as_capability), StringConstraints(pattern=r"^\d{1,3}\.\d{1,3}$")]
"""NVIDIA's name for what a GPU can do, such as "8.6" (RTX 3060), "8.9" (RTX 4090), "12.0" (RTX 5090)."""
MAX_COUNT = 10**15
"""Of requests, tokens and money. Beyond it sums of floats are no longer exact, and messages cannot hold it."""


class ModelLimit(SettingsModel):
    """`context`, `output`: reported to clients, in tokens. The others limit the requests of all callers together: per
    minute, tokens per minute, and at a time."""

    context: int | None = Field(default=None, gt=0)
    """Tokens of prompt and answer together; also listed as `max_model_len`. Default: not reported."""
    output: int | None = Field(default=None, gt=0)
    """Tokens of an answer. Default: not reported."""
    rpm: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Requests per minute. Default: not limited."""
    tpm: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Tokens per minute, prompts and answers together. Default: not limited."""
    parallel: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Requests at a time. Default: not limited."""


class Replicas(SettingsModel):
    """How many instances of a model to run: at least `min` stay loaded, up to `max` are added under load; at most
    `per_node` on one node."""

    min: int = Field(default=0, ge=0, le=1000)
    """Instances that are kept loaded wherever they fit; models of equal priority do not evict them. Default: `0`:
    loaded on request."""
    max: int = Field(default=1, ge=1, le=1000)
    """Instances that may be loaded while each has more requests than `replica_target`; only free memory is used for
    them. Default: `1`, or `min`."""
    per_node: int | None = Field(default=None, ge=1, le=1000)
    """Instances that one host may hold. No two of them share a device. Default: as many as it has devices for; one on a
    host without devices."""

    @model_validator(mode="before")
    @classmethod
    def _at_least_the_minimum(cls, data: object) -> object:
        if isinstance(data, Mapping) and "max" not in data and isinstance(data.get("min"), int):
            return {**data, "max": max(1, data["min"])}
        return data

    @model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


def with_tensor_size(data: object) -> object:
    """`min_devices` and `parallel.tensor` are the same: each is what the other says."""
    if not isinstance(data, Mapping) or not isinstance(data.get("parallel"), Mapping):
        return data
    short, parallel = data.get("min_devices"), data["parallel"]
    if isinstance(short, int) and "tensor" not in parallel:
        return {**data, "parallel": {**parallel, "tensor": short}}
    if "min_devices" not in data and isinstance(parallel.get("tensor"), int):
        return {**data, "min_devices": parallel["tensor"]}
    return data


def same_tensor_size(value: ParallelSettings | None, info: ValidationInfo) -> ParallelSettings | None:
    short = info.data.get("min_devices")
    if value is not None and short is not None and short != value.tensor:
        raise ValueError(f"tensor is {value.tensor}, but min_devices is {short}: remove one, or make them equal")
    return value


def no_devices(value: int | None) -> int | None:
    if value not in (None, 0):
        raise ValueError(
            "must be 0, for a model that runs on the CPU; min_devices or parallel say how many GPUs it gets"
        )
    return value


class Variant(SettingsModel):
    """One of several ways to run a model. None: as the model's own entry says. `name` defaults to `quant`, or else to
    its number from 1."""

    name: VariantName | None = None
    """What a request for it puts after the `@`; no white space and no `@`, unique in the model. Default: its `quant`,
    or else its number from 1."""
    harness: str | None = None
    """The kind of engine. Default: as the model."""
    quant: str | None = None
    """Quantisation. Default: as the model."""
    vram_mb: int | None = Field(default=None, gt=0)
    """Footprint of the whole model in MiB. Default: as the model."""
    devices: int | None = None
    """`0`: it runs on the CPU. Default: as the model."""
    min_devices: int | None = Field(default=None, ge=1, le=MAX_DEVICES)
    """GPUs that it is split over. Default: as the model."""
    parallel: ParallelSettings | None = None
    min_device_vram_mb: int | None = Field(default=None, gt=0)
    """Total memory that each of these GPUs must have. Default: as the model."""
    min_compute_capability: ComputeCapability | None = None
    """Compute capability that each of them must have. Default: as the model."""
    pinned_on: tuple[str, ...] | None = None
    """The only neurons that may hold it; `[]`: any. Default: as the model."""
    source: str | None = None
    """What the engine loads. Default: as the model."""
    args: tuple[str, ...] | None = None
    """Further engine arguments, instead of the model's. Default: as the model."""
    max_model_len: ContextLength = None
    """Tokens of context that it serves, or `"auto"`. Default: as the model."""

    _tensor_size_of_either = model_validator(mode="before")(with_tensor_size)
    _one_tensor_size = field_validator("parallel")(same_tensor_size)
    _no_devices = field_validator("devices")(no_devices)
