"""The load command that a neuron gets. Pure."""

from __future__ import annotations

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.node_plan import LoadPlan
from shared.protocol import GroupPart, LoadCommand, Parallelism


def part_command(
    plan: LoadPlan, whole: Parallelism, profile: ModelProfile, node: NodeSnapshot, group: GroupPart
) -> LoadCommand:
    """The command for one part of an engine that spans several neurons; `plan` is that of the part, `whole` says how
    the engine is split."""
    command = load_command(plan, profile, node)
    share = profile.device_share_mb
    return command.model_copy(
        update={
            "group": group,
            "tensor_parallel": whole.tensor if whole.tensor > 1 else None,
            "parallel": Parallelism.model_validate(whole.model_dump()),
            "vram_mb": share * len(plan.devices) if share else None,
        }
    )


def load_command(plan: LoadPlan, profile: ModelProfile | None, node: NodeSnapshot) -> LoadCommand:
    """The command for a plan. A sleeping model, or one that only neurons know, is sent by id alone: its neuron
    remembers the spec and devices, and refuses to wake it with different ones. A protocol v1 neuron remembers nothing,
    so the command repeats what it listed. `profile` is the plan's choice among the model's variants."""
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
    return LoadCommand(
        model_id=profile.id,
        instance=instance,
        variant=profile.variant,
        harness=profile.harness,
        quant=profile.quant,
        tensor_parallel=profile.tensor_parallel,
        parallel=profile.parallel,
        devices=list(plan.devices),
        source=profile.source,
        args=list(profile.args),
        vram_mb=profile.vram_mb,
        tools=profile.tools or None,
    )
