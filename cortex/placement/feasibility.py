"""Which nodes could ever hold a model. Pure."""

from __future__ import annotations

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.devices import eligible


def infeasible_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    """Why the node's topology can never hold the model; None when it can, or when it is not known yet.

    The rules of the contract; `vram_mb` is not among them. Health is no matter here.
    """
    if profile.pinned_on and node.name not in profile.pinned_on:
        return f"pinned on {', '.join(profile.pinned_on)}"
    if node.discovery is None:
        return None
    if profile.harness not in node.discovery.harnesses:
        offered = ", ".join(node.discovery.harnesses) or "none"
        return f"harness {profile.harness!r} is not offered (offered: {offered})"
    if len(node.devices) < profile.min_devices:
        return f"needs {profile.min_devices} devices, has {len(node.devices)}"
    enough = len(eligible(profile, node))
    if enough < profile.min_devices:
        return (
            f"needs {profile.min_devices} devices with {profile.min_device_vram_mb} MiB in total, "
            f"{enough} of {len(node.devices)} have that"
        )
    return None


def is_feasible(profile: ModelProfile, node: NodeSnapshot) -> bool:
    """True when the node's topology is known and can hold the model."""
    return node.discovery is not None and infeasible_reason(profile, node) is None
