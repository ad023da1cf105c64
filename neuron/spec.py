"""What an engine is to serve, and how. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from shared.protocol import FIRST_INSTANCE, GroupPart, Parallelism
from shared.protocol.context_length import AUTO, ContextLength
from shared.protocol.group import split_over

EXTENSIONS = frozenset(
    {"source", "args", "vram_mb", "served_names", "parallel", "max_model_len", "max_loras", "max_lora_rank"}
)
"""Fields of a load command that protocol v1 does not have."""
_COMPARED = (
    "harness",
    "source",
    "quant",
    "tensor_parallel",
    "parallel",
    "group",
    "devices",
    "args",
    "vram_mb",
    "max_model_len",
    "max_loras",
    "max_lora_rank",
    "served_names",
)


class InstanceKey(NamedTuple):
    """Identifies one engine of this host. As text it is the model's id, and the instance unless that is the first."""

    model_id: str
    instance: str = FIRST_INSTANCE

    def __str__(self) -> str:
        return self.model_id if self.instance == FIRST_INSTANCE else f"{self.model_id} instance {self.instance}"

    @property
    def order(self) -> tuple[bool, int, str]:
        """Sorts the instances of a model: numbers by their value, then other names."""
        number = self.instance.isdecimal()
        return not number, int(self.instance) if number else 0, self.instance


@dataclass(frozen=True)
class EngineSpec:
    """A load command, checked and completed. `devices` None: neuron chooses, else in the order of the ranks, or none of
    them for an engine on the CPU; `vram_mb`: MiB on all devices together, or in RAM. `instance` and the label `variant`
    change nothing about the engine itself.

    With `group` it is one part of an engine that spans several neurons: `parallel` describes the whole engine,
    `devices` and `vram_mb` this part.

    `max_model_len` AUTO: `fitted_len` is the longest context that fits by the estimate, 0 if all of the model's does,
    None if neuron cannot estimate it.

    `max_loras`: how many LoRA adapters it can have at a time; None: none. `max_lora_rank` None: `fitted_rank` is the
    highest rank of those at `lora_sources`, None if that is not known."""

    model_id: str
    harness: str
    source: str
    quant: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    group: GroupPart | None = None
    devices: tuple[int, ...] | None = None
    args: tuple[str, ...] = ()
    vram_mb: int | None = None
    max_model_len: ContextLength = None
    fitted_len: int | None = field(default=None, compare=False)
    max_loras: int | None = None
    max_lora_rank: int | None = None
    lora_sources: tuple[str, ...] = field(default=(), compare=False)
    fitted_rank: int | None = field(default=None, compare=False)
    served_names: tuple[str, ...] = ()
    instance: str = FIRST_INSTANCE
    variant: str | None = None
    said: frozenset[str] = field(default=EXTENSIONS, compare=False)
    """The fields beyond protocol v1 that the command set."""

    @property
    def key(self) -> InstanceKey:
        return InstanceKey(self.model_id, self.instance)

    @property
    def parallel(self) -> Parallelism:
        return Parallelism(
            tensor=self.tensor_parallel,
            pipeline=self.pipeline_parallel,
            data=self.data_parallel,
            expert=self.expert_parallel,
        )

    @property
    def local_parallel(self) -> Parallelism:
        """How it is split over this host's devices."""
        return self.parallel if self.group is None else split_over(self.parallel, self.group.size)

    @property
    def device_count(self) -> int:
        """Of this host."""
        return self.local_parallel.devices

    @property
    def without_devices(self) -> bool:
        """True if it runs on the host's CPU: its memory is the host's RAM."""
        return self.devices == ()

    @property
    def context(self) -> int | None:
        """The context length that neuron gives the engine, in tokens; None leaves it to the engine."""
        return (self.fitted_len or None) if self.max_model_len == AUTO else self.max_model_len

    @property
    def serves(self) -> bool:
        """False for a part of a group that takes no requests."""
        return self.group is None or self.group.serves

    @property
    def share_mb(self) -> int | None:
        """`vram_mb` per device, rounded up; None when it is not given."""
        return None if self.vram_mb is None else -(-self.vram_mb // self.device_count)

    def difference(self, wanted: EngineSpec) -> str | None:
        """The first difference between this spec and `wanted`, in words; None when an engine of this spec will do.

        Devices count only if `wanted` names them, and extensions only if its command set them.
        """
        if wanted.devices is None:
            wanted = replace(wanted, devices=self.devices)
        for name in _COMPARED:
            if name in EXTENSIONS and name not in wanted.said:
                continue
            mine, theirs = getattr(self, name), getattr(wanted, name)
            if mine != theirs:
                return f"{name} is {_text(mine)}, asked for {_text(theirs)}"
        return None


def _text(value: object) -> str:
    return str(value) if isinstance(value, Parallelism) else repr(value)
