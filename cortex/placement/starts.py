"""Which engines are starting on a device, and how long that still takes. Pure.

A neuron starts one engine at a time on a device, as each measures the free memory. A model placed there waits until the
others have started, however small it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.capacity import estimated_load_secs
from cortex.placement.inputs import PlanningView
from shared.protocol import RAM, ModelView

WAIT_STEP_SECS = 10.0
"""Waits are compared in steps of this: estimates change with each report, and plans should not."""


@dataclass(frozen=True)
class Starts:
    """The models that start on the same devices, one after another, and the seconds until the last one has started."""

    models: tuple[str, ...] = ()
    remaining_secs: float = 0.0

    @property
    def rank(self) -> int:
        """0 without a start, higher for a longer wait."""
        return max(1, math.ceil(self.remaining_secs / WAIT_STEP_SECS)) if self.models else 0

    @property
    def reason(self) -> str:
        """What an engine there waits for, for people."""
        return f"starts after {', '.join(self.models)} on the same device, in about {math.ceil(self.remaining_secs)} s"


NO_STARTS = Starts()


def starts_by_device(view: PlanningView, node: NodeSnapshot, model_id: str) -> dict[int, Starts]:
    """By device index, the starts that `model_id` would wait for there; devices without any are left out."""
    found: dict[int, Starts] = {}
    reported = {key: view for key, view in node.listed if view.coming}
    ours = {each.key: each for each in view.fleet.reservations if each.node == node.name}
    for key in sorted(reported.keys() | ours.keys()):
        if key.model_id == model_id:
            continue
        entry = reported.get(key)
        devices = entry.devices if entry is not None and entry.devices else ours[key].devices if key in ours else ()
        remaining = _remaining_secs(view, node, key.model_id, entry)
        for index in devices:
            if index == RAM:
                continue  # engines on the CPU start beside each other
            before = found.get(index, NO_STARTS)
            found[index] = Starts((*before.models, key.model_id), before.remaining_secs + remaining)
    return found


def starting_groups(view: PlanningView, node: NodeSnapshot, model_id: str) -> list[str]:
    """Other models with an engine that spans several nodes and is starting a part on this one."""
    ours = {each.model_id for each in view.fleet.reservations if not each.serves}
    found = {each.model_id for each in view.fleet.reservations if each.node == node.name and each.model_id in ours}
    found |= {each.view.id for each in node.every_engine() if each.view.coming and each.view.group is not None}
    return sorted(found - {model_id})


def longest(starts: Mapping[int, Starts], indices: Iterable[int]) -> Starts:
    """What an engine on all these devices waits for the longest."""
    if not starts:  # the usual case, for each of many sets
        return NO_STARTS
    found = (starts.get(index, NO_STARTS) for index in indices)
    return max(found, key=lambda each: (each.rank, each.remaining_secs), default=NO_STARTS)


def _remaining_secs(view: PlanningView, node: NodeSnapshot, model_id: str, entry: ModelView | None) -> float:
    progress = None if entry is None else entry.progress
    if progress is not None and progress.remaining_secs is not None:
        return max(0.0, progress.remaining_secs)
    profile = view.profile(model_id)
    if profile is not None and profile.variants:
        profile = profile.choice(None if entry is None else entry.variant) or profile
    size_mb = 0 if profile is None else view.device_share_mb(profile) * profile.device_count
    name = model_id if profile is None else profile.requested.name
    elapsed = 0.0 if progress is None or progress.elapsed_secs is None else progress.elapsed_secs
    return max(0.0, estimated_load_secs(view, name, node.name, size_mb) - elapsed)
