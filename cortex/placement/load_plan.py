"""A plan to load a model, and the commands that carry it out. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum

from cortex.config.catalogue import LoraSettings
from cortex.config.profile import ModelProfile, RequestedModel
from cortex.fleet.snapshot import NodeSnapshot, Reservation
from cortex.placement.eviction import NO_EVICTIONS, EvictionPlan
from cortex.placement.starts import NO_STARTS, Starts
from cortex.routing.replica import ReplicaKey
from shared.protocol import RAM, GroupPart, LoadCommand, Parallelism
from shared.protocol.reserved_arguments import CONTEXT_FLAG


class Fit(IntEnum):
    """How a model fits on a node, best first."""

    AWAKE = 0  # sleeps there and its memory is still available
    NOW = 1  # fits in free memory
    OVER_SLEEPERS = 2  # fits, but uses memory that sleeping models there would need
    AFTER_EVICTION = 3
    TOO_LARGE = 4  # by the figures; `vram_mb` is an estimate, so the neuron decides


@dataclass(frozen=True)
class LoadPlan:
    """Where to load a model, and what to evict for it. `variant`: in which of its variants, None without any.

    `devices` of a model on the CPU are `RAM`. `device_share_mb` is what each device must give, 0 when unknown.
    `reserve_mb` is what to count as taken on each until the neuron reports it. `spare_mb` is what stays free on all
    devices together (negative: what is missing). `ready_at` is when it can start, on the view's clock. `expected_secs`
    is the expected load time, if known. `wakes`: the model sleeps there and is woken. `instance` names the engine among
    those of the model on the node, "" on a node that has one for each model. `starts` are those of other engines that
    the neuron finishes first.

    With `parts` the engine spans several nodes: this is the plan of the part that takes the requests, `parts` are those
    of the others by rank, `whole` says how it is split, and `network` what connects the nodes, for people ("" if
    unknown). Evictions, spare memory and waits are those of all together.
    """

    model_id: str
    node: str
    devices: tuple[int, ...]
    device_share_mb: int
    fit: Fit
    spare_mb: int
    reserve_mb: int
    variant: str | None = None
    eviction_plan: EvictionPlan = NO_EVICTIONS
    ready_at: float = float("-inf")
    expected_secs: float | None = None
    wakes: bool = False
    instance: str = ""
    starts: Starts = NO_STARTS
    parts: tuple[LoadPlan, ...] = ()
    whole: Parallelism | None = None
    network: str = ""
    memory_known: bool = True
    """Whether the node tells how much memory is free there."""
    rank: tuple[object, ...] = field(default=(), compare=False)

    @property
    def gpus(self) -> tuple[int, ...]:
        """Its devices without the host's RAM."""
        return tuple(index for index in self.devices if index != RAM)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes of its parts, by rank."""
        return self.node, *(part.node for part in self.parts)

    @property
    def key(self) -> ReplicaKey:
        """Of the engine to load."""
        return ReplicaKey(self.model_id, self.node, self.instance)

    @property
    def displaces(self) -> list[str]:
        """The models that it evicts."""
        return [each.resident.key.model_id for each in self.eviction_plan.evictions]

    @property
    def reason(self) -> str:
        over = f" over {self.network}" if self.network else ""
        span = "" if self.whole is None else f"spans {len(self.nodes)} neurons ({self.whole}){over}, "
        return f"{' + '.join(self.nodes)}: {'' if self.variant is None else f'{self.variant} '}{span}{self.fit_reason}"

    @property
    def fit_reason(self) -> str:
        """How it fits on its node, and what it waits for there, for people."""
        return f"{self._fit_reason}; {self.starts.reason}" if self.starts.models else self._fit_reason

    @property
    def _fit_reason(self) -> str:
        if self.fit is Fit.AWAKE:
            return "asleep there, can be woken"
        memory = "MiB of RAM" if RAM in self.devices else "MiB"
        if not self.memory_known and self.fit is not Fit.AFTER_EVICTION:
            return "fits as far as is known: the neuron does not tell how much memory is free"
        if self.fit is Fit.NOW:
            return f"fits now with {self.spare_mb} {memory} to spare"
        if self.fit is Fit.OVER_SLEEPERS:
            return f"fits now with {self.spare_mb} {memory} to spare, in memory that sleeping models need to wake"
        names = ", ".join(self.displaces)
        if self.fit is Fit.AFTER_EVICTION:
            return f"fits after evicting {names}"
        after = f" even after evicting {names}" if names else ""
        missing = f"{-self.spare_mb} MiB more than available{after}"
        where = memory if RAM in self.devices else "MiB on each device"
        return f"needs {self.device_share_mb} {where}, {missing}; trying anyway"

    @property
    def requested(self) -> RequestedModel:
        """The model, or the variant of it that is loaded."""
        return RequestedModel(self.model_id, self.variant)

    @property
    def reservations(self) -> tuple[Reservation, ...]:
        """What is reserved for all parts while the plan is carried out."""
        return self.reservation, *(replace(part.reservation, serves=False) for part in self.parts)

    @property
    def reservation(self) -> Reservation:
        """What is reserved on its own node."""
        return Reservation(self.model_id, self.node, self.devices, self.reserve_mb, self.instance, self.variant)


def part_command(
    plan: LoadPlan,
    whole: Parallelism,
    profile: ModelProfile,
    node: NodeSnapshot,
    group: GroupPart,
    *,
    loras: LoraSettings | None = None,
) -> LoadCommand:
    """The command for one part of an engine that spans several neurons; `plan` is that of the part, `whole` says how
    the engine is split."""
    command = load_command(plan, profile, node, loras)
    share = profile.device_share_mb
    return command.model_copy(
        update={
            "group": group,
            "tensor_parallel": whole.tensor if whole.tensor > 1 else None,
            "parallel": Parallelism.model_validate(whole.model_dump()),
            "vram_mb": share * len(plan.devices) if share else None,
        }
    )


def load_command(
    plan: LoadPlan, profile: ModelProfile | None, node: NodeSnapshot, loras: LoraSettings | None = None
) -> LoadCommand:
    """The command for a plan. A sleeping model, or one that only neurons know, is sent by id alone: its neuron
    remembers the spec and devices, and refuses to wake it with different ones. A protocol v1 neuron remembers nothing,
    so the command repeats what it listed. `profile` is the plan's choice among the model's variants, `loras` what the
    catalogue says of its adapters."""
    remembers = node.discovery is None or node.discovery.instance_id is not None
    instance = plan.instance or None
    if remembers and (plan.wakes or profile is None):
        return LoadCommand(model_id=plan.model_id, instance=instance)
    if profile is None:
        view = node.models[plan.model_id][plan.instance]
        return LoadCommand(
            model_id=plan.model_id,
            harness=view.harness,
            tensor_parallel=len(view.devices) if len(view.devices) > 1 else None,
            devices=view.devices or None,
        )
    context = [] if knows_context(node) else context_arguments(profile)
    return LoadCommand(
        model_id=profile.id,
        instance=instance,
        variant=profile.variant,
        harness=profile.harness,
        quant=profile.quant,
        tensor_parallel=profile.tensor_parallel,
        parallel=profile.parallel,
        devices=_named_devices(plan, profile, node),
        source=profile.source,
        args=[*profile.args, *context],
        vram_mb=profile.vram_mb,
        max_model_len=None if context else profile.max_model_len,
        tools=profile.tools or None,
        max_loras=None if loras is None else loras.max_loras,
        max_lora_rank=None if loras is None else loras.max_rank,
        lora_sources=[] if loras is None else list(loras.sources),
    )


def _named_devices(plan: LoadPlan, profile: ModelProfile, node: NodeSnapshot) -> list[int] | None:
    """An empty list means the CPU, except to a neuron that tells nothing of RAM."""
    if profile.on_cpu and (node.discovery is None or node.discovery.host is None):
        return None
    return list(plan.gpus)


def knows_context(node: NodeSnapshot) -> bool:
    """Whether its loads may have a `max_model_len`. The version that brought it also brought the host's RAM."""
    return node.discovery is not None and node.discovery.host is not None


def context_arguments(profile: ModelProfile) -> list[str]:
    """The context length of a load for a neuron that does not know `max_model_len`: for vLLM an argument says it."""
    length = profile.max_model_len
    return [CONTEXT_FLAG, str(length)] if isinstance(length, int) and profile.serves_as_vllm else []
