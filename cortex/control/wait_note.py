"""What a client is told while it waits for a model, and when it has waited too long. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cortex.control.decision import InFlight
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.routing.replica import ReplicaKey, WaitNote
from shared.errors import Unavailable
from shared.protocol import ErrorCode, ModelStatus, ModelView, Progress
from shared.retry_after import LOAD_TIMED_OUT_SECS

if TYPE_CHECKING:
    from cortex.control.loads.loader import LoadJob

_WAITING = "waiting"
"""The phase of a load that its neuron has not started yet."""
_STOPPING = "stopping"
"""The state of a model whose engine has finished its requests."""


def waiting_note(
    model_id: str, fleet: FleetSnapshot, job: LoadJob | None, wait_reason: str | None, now: float
) -> WaitNote:
    """What happens to the model, on which node, and how long it will still take. `job` is our load of it, `wait_reason`
    why the planner has not started one; `now` is Unix time."""
    if job is not None and job.node in fleet.nodes:
        what = job.phase if job.loading_since is None else "loading"
        return _in_progress(job.plan.key, fleet.nodes[job.node], what, now - job.started)
    for engine in fleet.engines(model_id):
        node, status = engine.node, engine.view.known_status
        if status is None or not node.healthy or engine.key in fleet.evicting:
            continue
        if status.coming:
            return _in_progress(engine.key, node, status.value, None)
        if engine.view.servable_now:
            limit = engine.limit
            what = "looking up its address" if limit is None else f"it takes {limit} at a time, waiting for one to end"
            return WaitNote(text=f"{model_id} is loaded on {node.name}; {what}", node=node.name)
    return WaitNote(text=f"waiting to load {model_id}" + (f": {wait_reason}" if wait_reason else ""))


def waited_too_long(model_id: str, engines: str, secs: float, wait_reason: str | None, *, served: bool) -> Unavailable:
    """The error for a request that waited `secs` seconds for the model. `engines` is the model whose engines serve it,
    another one for an adapter; `served`: some do. `wait_reason` as of `waiting_note`."""
    code = ErrorCode.UNAVAILABLE if served else ErrorCode.COLD_LOAD_FAILED
    if served and engines != model_id:
        message = (
            f"no engine of {engines!r} had room for the adapter {model_id!r} within {secs:g} s: each has as many "
            "adapters as max_loras allows, and all of them are in use"
        )
    elif served:
        message = f"{model_id!r} has as many requests as its neurons allow; none ended within {secs:g} s"
    else:
        message = f"loading {model_id!r} timed out after {secs:g} s{f' ({wait_reason})' if wait_reason else ''}"
    return Unavailable(message, code=code, retry_after=LOAD_TIMED_OUT_SECS)


def leaving_text(fleet: FleetSnapshot, node: NodeSnapshot, in_flight: InFlight) -> str:
    """What the models that are leaving the node still have to do: `a has 2 requests of this cortex to finish`. "" when
    none is leaving."""
    return "; ".join(_leaving(key, node, in_flight) for key in sorted(fleet.evicting) if key.node == node.name)


def _leaving(key: ReplicaKey, node: NodeSnapshot, in_flight: InFlight) -> str:
    model_id, count, view = key.model_id, in_flight(key), node.view(key.model_id, key.instance)
    if count:
        return f"{model_id} has {count} request{'' if count == 1 else 's'} of this cortex to finish"
    if view is not None and view.progress is not None and view.progress.message:
        return f"{model_id} has {view.progress.message}"
    if view is not None and view.state == _STOPPING:
        return f"the processes of {model_id} are ending"
    return f"{model_id} is about to end"


def _in_progress(key: ReplicaKey, node: NodeSnapshot, what: str, elapsed_secs: float | None) -> WaitNote:
    view = node.view(key.model_id, key.instance)
    detail = "" if view is None or view.progress is None else _progress_text(view.progress)
    ahead = _starts_ahead(view, node)
    if ahead:
        detail = f": {ahead}"
    elif view is not None and view.progress is not None and view.progress.phase == _WAITING and view.progress.message:
        detail = f": {view.progress.message}"
    elif detail:
        detail = f": {detail}"
    elif view is not None and view.known_status is ModelStatus.RECOVERING and view.reason:
        detail = f": {view.reason}"
    elif elapsed_secs is not None:
        detail = f" for {max(elapsed_secs, 0):.0f} s"
    return WaitNote(text=f"{what} {key.model_id} on {node.name}{detail}", node=node.name)


def _starts_ahead(view: ModelView | None, node: NodeSnapshot) -> str:
    """`waiting for org/big to start on the same device: loading weights 40 %`; "" unless its neuron says that the
    model waits for such a start."""
    if view is None or view.progress is None or view.progress.phase != _WAITING:
        return ""
    ahead = [
        other
        for other in node.views
        if other is not view
        and other.coming
        and not set(other.devices).isdisjoint(view.devices)
        and not (other.progress is not None and other.progress.phase == _WAITING)
    ]
    if not ahead:
        return ""
    text = f"waiting for {', '.join(each.id for each in ahead)} to start on the same device"
    progress = "" if ahead[0].progress is None else _progress_text(ahead[0].progress)
    return f"{text}: {progress}" if progress else text


def _progress_text(progress: Progress) -> str:
    """`loading weights 40 %, about 35 s left`, as far as known; "" without any."""
    phase, fraction, left = progress.phase, progress.fraction, progress.remaining_secs
    parts = [phase] if phase else []
    if phase and fraction is not None:
        parts = [f"{phase} {100 * fraction:.0f} %"]
    if progress.idle_secs is not None:
        parts.append(f"nothing done for {progress.idle_secs:.0f} s")
    elif left is not None:
        parts.append(f"about {math.ceil(left)} s left")
    return ", ".join(parts)
