"""Why a load failed, and whether that is the node's or the model's fault. Pure."""

from __future__ import annotations

from cortex.control.load_backoff import BackoffCause
from cortex.fleet.neuron_client import NeuronRefused
from cortex.placement.load_plan import LoadPlan
from shared.protocol import ErrorCode, ModelView

_TEMPORARY = (ErrorCode.NEURON_STOPPING, ErrorCode.LOAD_CANCELLED)


class LoadFailure(Exception):
    """A load that failed. `no_memory`: the neuron lacked memory; `needed_mb` is what it would have booked on each
    device, if it said so. `permanent`: another load there would fail too. `node`: where, of an engine that spans
    several."""

    def __init__(
        self,
        reason: str,
        cause: BackoffCause,
        *,
        no_memory: bool = False,
        needed_mb: int | None = None,
        permanent: bool = False,
        node: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.node = node
        self.cause = cause
        self.no_memory = no_memory
        self.needed_mb = needed_mb
        self.permanent = permanent or cause is BackoffCause.MODEL


def cause_of(view: ModelView | None) -> BackoffCause:
    """What caused a model to fail, as its neuron reports it."""
    return _cause(None if view is None else view.cause)


def is_permanent(view: ModelView | None) -> bool:
    """True if a model that failed would fail on that node again."""
    return view is not None and (view.permanent is True or cause_of(view) is BackoffCause.MODEL)


def _cause(text: str | None) -> BackoffCause:
    try:
        return BackoffCause(text or "")
    except ValueError:
        return BackoffCause.UNKNOWN


def failure_of(plan: LoadPlan, refused: NeuronRefused) -> LoadFailure:
    reason = f"loading {plan.model_id!r} on {plan.node} failed: {refused}"
    if refused.code == ErrorCode.GROUP_STARTING:
        return LoadFailure(reason, BackoffCause.BUSY)
    if refused.code in _TEMPORARY:
        return LoadFailure(reason, BackoffCause.TEMPORARY)
    if refused.code in (ErrorCode.INSUFFICIENT_VRAM, ErrorCode.INSUFFICIENT_RAM):
        needed = [each.needed_mb for each in refused.devices if each.index in plan.devices and each.needed_mb]
        return LoadFailure(
            reason,
            BackoffCause.NODE,
            no_memory=True,
            needed_mb=max(needed, default=None),
            permanent=refused.permanent,
        )
    if refused.code == ErrorCode.INVALID_REQUEST and refused.cause is None:
        return LoadFailure(reason, BackoffCause.MODEL)
    return LoadFailure(reason, _cause(refused.cause), permanent=refused.permanent)
