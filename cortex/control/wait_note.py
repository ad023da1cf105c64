"""What a client is told while it waits for a model. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.upstream.replica import WaitNote
from shared.protocol import ModelStatus, Progress

if TYPE_CHECKING:
    from cortex.control.loader import LoadJob


def waiting_note(model_id: str, fleet: FleetSnapshot, job: LoadJob | None, turn: str | None, now: float) -> WaitNote:
    """Where the model is on its way, how far, and how long it will still take. `job` is our load of it, `turn` what it
    waits for before one can begin, in the planner's words; `now` is Unix time."""
    if job is not None and job.node in fleet.nodes:
        what = job.phase if job.loading_since is None else "loading"
        return _on_its_way(model_id, fleet.nodes[job.node], what, now - job.started)
    for node in fleet.holders(model_id):
        status = node.status_of(model_id)
        if status is None or not node.healthy or (model_id, node.name) in fleet.leaving:
            continue
        if status.coming:
            return _on_its_way(model_id, node, status.value, None)
        if status is ModelStatus.LOADED:
            return WaitNote(text=f"{model_id} is loaded on {node.name}, which is asked for its address", node=node.name)
    return WaitNote(text=f"waiting for a place for {model_id}" + (f": {turn}" if turn else ""))


def _on_its_way(model_id: str, node: NodeSnapshot, what: str, elapsed_secs: float | None) -> WaitNote:
    view = node.models.get(model_id)
    told = "" if view is None or view.progress is None else _told(view.progress)
    if told:
        told = f": {told}"
    elif view is not None and view.known_status is ModelStatus.RECOVERING and view.reason:
        told = f": {view.reason}"
    elif elapsed_secs is not None:
        told = f" for {max(elapsed_secs, 0):.0f} s"
    return WaitNote(text=f"{what} {model_id} on {node.name}{told}", node=node.name)


def _told(progress: Progress) -> str:
    """`loading weights 40 %, about 35 s left`, as far as it is known; "" when nothing is."""
    phase, fraction, left = progress.phase, progress.fraction, progress.remaining_secs
    parts = [phase] if phase else []
    if phase and fraction is not None and math.isfinite(fraction):
        parts = [f"{phase} {100 * fraction:.0f} %"]
    if left is not None and math.isfinite(left):
        parts.append(f"about {math.ceil(left)} s left")
    return ", ".join(parts)
