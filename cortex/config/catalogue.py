"""models.toml: the models that clients may request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from shared.protocol import MAX_MODEL_ID_CHARS, Parallelism
from shared.protocol.parallel import MAX_DEVICES, ParallelSettings
from shared.settings import SettingsModel, load_settings

DEFAULT_PRIORITY = 100
DEFAULT_PINNED_PRIORITY = 1000

AUTO_TOOL_CHOICE = b"--enable-auto-tool-choice"
"""In vLLM's refusal of a request with tools, and in the arguments that prevent it."""

TOOLS_HINT = (
    "set tools = true for this model in models.toml and load it again (or put --enable-auto-tool-choice "
    "--tool-call-parser NAME into its args)"
)

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_MODEL_ID_CHARS, pattern=r"^[^\s\x00-\x1f]+$")]


class TokenLimit(SettingsModel):
    """Limits reported to clients, in tokens."""

    context: int | None = Field(default=None, gt=0)
    output: int | None = Field(default=None, gt=0)


class Replicas(SettingsModel):
    """How many instances of a model to run: at least `min` stay loaded, up to `max` are added under load; at most
    `per_node` on one node."""

    min: int = Field(default=0, ge=0, le=1000)
    max: int = Field(default=1, ge=1, le=1000)
    per_node: int | None = Field(default=None, ge=1, le=1000)

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


class ModelProfile(SettingsModel):
    """One model of the catalogue. Memory in MiB; models.example.toml documents the defaults."""

    id: ModelName
    harness: str = "vllm"
    quant: str | None = None
    vram_mb: int | None = Field(default=None, gt=0)
    min_devices: int = Field(default=1, ge=1, le=MAX_DEVICES)
    parallel: ParallelSettings | None = None
    min_device_vram_mb: int | None = Field(default=None, gt=0)
    pinned_on: tuple[str, ...] = ()
    residency_priority: int = DEFAULT_PRIORITY
    replicas: Replicas = Replicas()
    min_residency_secs: float | None = Field(default=None, ge=0)
    idle_ttl_secs: float | None = Field(default=None, gt=0)
    when_idle: Literal["unload", "sleep"] = "unload"
    source: str | None = None
    args: tuple[str, ...] = ()
    tools: bool = False
    limit: TokenLimit | None = None

    @model_validator(mode="before")
    @classmethod
    def _pinned_models_rank_high(cls, data: object) -> object:
        if isinstance(data, Mapping) and data.get("pinned_on") and "residency_priority" not in data:
            return {**data, "residency_priority": DEFAULT_PINNED_PRIORITY}
        return data

    @model_validator(mode="before")
    @classmethod
    def _tensor_size_of_either(cls, data: object) -> object:
        """`min_devices` and `parallel.tensor` are the same: each is what the other says."""
        if not isinstance(data, Mapping) or not isinstance(data.get("parallel"), Mapping):
            return data
        short, parallel = data.get("min_devices"), data["parallel"]
        if isinstance(short, int) and "tensor" not in parallel:
            return {**data, "parallel": {**parallel, "tensor": short}}
        if "min_devices" not in data and isinstance(parallel.get("tensor"), int):
            return {**data, "min_devices": parallel["tensor"]}
        return data

    @field_validator("parallel")
    @classmethod
    def _same_tensor_size(cls, value: ParallelSettings | None, info: ValidationInfo) -> ParallelSettings | None:
        short = info.data.get("min_devices")
        if value is not None and short is not None and short != value.tensor:
            raise ValueError(f"tensor is {value.tensor}, but min_devices is {short}: remove one, or make them equal")
        return value

    @cached_property
    def parallelism(self) -> Parallelism:
        """How it is split: `parallel`, or `min_devices`, its short form."""
        return self.parallel or Parallelism.model_construct(tensor=self.min_devices)

    @cached_property
    def device_count(self) -> int:
        return self.parallelism.devices

    @property
    def tensor_parallel(self) -> int | None:
        """The value sent to a neuron; None means a single device."""
        return self.parallelism.tensor if self.parallelism.tensor > 1 else None

    @property
    def refuses_tools(self) -> bool:
        """True if vLLM answers a request with tools with 400."""
        flag = AUTO_TOOL_CHOICE.decode()
        return self.harness == "vllm" and not self.tools and not any(arg.startswith(flag) for arg in self.args)

    @property
    def device_share_mb(self) -> int:
        """What each device must give, in MiB; 0 when the footprint is unknown."""
        return 0 if self.vram_mb is None else -(-self.vram_mb // self.device_count)


class Catalogue(SettingsModel):
    """The whole of models.toml."""

    models: tuple[ModelProfile, ...] = ()
    aliases: dict[ModelName, str] = Field(default_factory=dict)

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: tuple[ModelProfile, ...]) -> tuple[ModelProfile, ...]:
        seen: set[str] = set()
        for profile in value:
            if profile.id in seen:
                raise ValueError(f"the model {profile.id!r} is listed twice")
            seen.add(profile.id)
        return value

    @model_validator(mode="after")
    def _aliases_lead_somewhere(self) -> Catalogue:
        ids = {profile.id for profile in self.models}
        for alias, target in self.aliases.items():
            if alias in ids:
                raise ValueError(f"aliases: {alias!r} is also the id of a model")
            if target not in ids:
                raise ValueError(f"aliases: {alias!r} points to {target!r}, which is not in this catalogue")
        return self

    @cached_property
    def _by_id(self) -> dict[str, ModelProfile]:
        return {profile.id: profile for profile in self.models}

    def profile(self, model_id: str) -> ModelProfile | None:
        """The model with this id; None when the catalogue does not have it."""
        return self._by_id.get(model_id)

    def resolve(self, name: str) -> str:
        """The model id for a name that may be an alias."""
        return self.aliases.get(name, name)


def load_catalogue(path: Path) -> Catalogue:
    """Reads and validates models.toml.

    Raises:
        SettingsError: with every problem found.
    """
    return load_settings(Catalogue, path, env_prefix="", environ={})
