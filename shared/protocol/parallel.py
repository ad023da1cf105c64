"""How a model is split over devices. Pure."""

from __future__ import annotations

from pydantic import ConfigDict, Field, model_validator

from shared.protocol.base import WireModel

MAX_DEVICES = 64
"""The most devices of one engine."""


class Parallelism(WireModel):
    """The ranks of an engine, one on each device: `data` copies, each of `pipeline` stages of `tensor` devices.

    `expert`: experts are distributed over the devices instead of each being split. Ranks are numbered as in vLLM: the
    tensor groups of a copy's stages follow one another, then those of the next copy.
    """

    tensor: int = Field(default=1, ge=1, le=MAX_DEVICES)
    """GPUs that each layer is split over. They wait for each other in every layer, so they are chosen for fast paths:
    NVLink first. Default: `1`, or what `min_devices` or `tensor_parallel` of the same table says."""
    pipeline: int = Field(default=1, ge=1, le=MAX_DEVICES)
    """Stages of consecutive layers, each on `tensor` GPUs. Stages exchange little, so they may be far apart."""
    data: int = Field(default=1, ge=1, le=MAX_DEVICES)
    """Copies of the model in one engine, each on `tensor` x `pipeline` GPUs. Of a mixture of experts only the rest is
    copied; the experts are split over all copies."""
    expert: bool = False
    """Whether the experts of a mixture of experts are distributed over the GPUs, instead of each being split."""

    @model_validator(mode="after")
    def _not_too_many(self) -> Parallelism:
        if self.devices > MAX_DEVICES:
            raise ValueError(f"{self} needs {self.devices} devices, at most {MAX_DEVICES} are possible")
        return self

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def tensor_groups(self) -> int:
        """How many groups of `tensor` devices there are."""
        return self.pipeline * self.data

    @property
    def tensor_only(self) -> bool:
        """True if the tensor-parallel size says all: protocol v1 knows nothing else."""
        return self.tensor_groups == 1 and not self.expert

    def with_tensor(self, tensor: int | None) -> Parallelism:
        """With the tensor-parallel size that another field gives, if any.

        Raises:
            ValueError: this one is given too, and differs; or there are too many devices.
        """
        if tensor is None or tensor == self.tensor:
            return self
        if "tensor" in self.model_fields_set:
            raise ValueError(f"{tensor}, but parallel.tensor is {self.tensor}: remove one, or make them equal")
        return type(self).model_validate({**self.model_dump(), "tensor": tensor})

    def __str__(self) -> str:
        parts = [f"tensor {self.tensor}", f"pipeline {self.pipeline}", f"data {self.data}"]
        return " x ".join(parts) + (", expert" if self.expert else "")


class ParallelSettings(Parallelism):
    """The same in a configuration file, where an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")
