"""Which answers are violations, which ones a fault excuses, and how many succeeded. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.e2e.chaos.faults import Fault
from tests.e2e.chaos.fleet import POLL_SECS, Fleet
from tests.e2e.chaos.load import Answered
from tests.e2e.chaos.models import feasible_hosts, model_of
from tests.e2e.chaos.outcomes import Kind

SEEN_SECS = POLL_SECS + 1.0
"""A restarted neuron counts as live once every cortex has had time to poll it."""
BACKOFF_SECS = 20.0
"""For how long cortex does not load a model on a host where faults have ended two loads of it."""
_NOT_LOADED = "cold_load_failed"
_LOST = ("stream:upstream_lost", "stream:500")
"""The last is vLLM's own, when it is stopped."""
STOPPING = "cortex_stopping"
"""The error code for requests that wait for a load when cortex stops."""
_GRACE_SECS = 1.5
"""How long after a fault that hit engines it may still explain lost answers on their host."""


@dataclass(frozen=True)
class Verdict:
    """`counted`: requests that stayed to their end, always had a cortex and a live, feasible neuron, and could succeed.
    `succeeded`: how many of them did. Not counted, however slow the machine: `lost`, whose engine was killed after the
    answer had begun, and `barred`, refused because faults had ended the model's loads on every host that was left."""

    violations: list[Answered]
    counted: list[Answered]
    succeeded: int
    failures: list[Answered]
    lost: int
    barred: int

    @property
    def share(self) -> float:
        return self.succeeded / len(self.counted) if self.counted else 0.0


def judge(fleet: Fleet, answers: Sequence[Answered], faults: Sequence[Fault]) -> Verdict:
    violations, counted, failures, lost, barred = [], [], [], 0, 0
    cortexes = {cortex.name: cortex for cortex in fleet.cortexes}
    for answer in answers:
        kind = answer.outcome.kind
        turned_away = kind in (Kind.REFUSED, Kind.CUT) or answer.outcome.code.endswith(STOPPING)
        without_cortex = turned_away and cortexes[answer.cortex].was_down(answer.since, answer.until)
        hit = _was_hit(answer, faults)
        # A plain answer in progress can only end in a cut connection.
        cut_with_engine = kind is Kind.CUT and answer.head_at is not None and not answer.asked.streamed and hit
        excused = without_cortex or cut_with_engine
        if kind is Kind.VIOLATION or (kind in (Kind.REFUSED, Kind.CUT) and not excused):
            violations.append(answer)
        if kind is Kind.LEFT or without_cortex or not had_live_neuron(fleet, answer):
            continue
        if hit and (kind is Kind.CUT or answer.outcome.code in _LOST):
            lost += 1
            continue
        if answer.outcome.code.endswith(_NOT_LOADED) and _was_barred(fleet, answer, faults):
            barred += 1
            continue
        counted.append(answer)
        if kind is not Kind.COMPLETE:
            failures.append(answer)
    return Verdict(violations, counted, len(counted) - len(failures), failures, lost, barred)


def had_live_neuron(fleet: Fleet, answer: Answered) -> bool:
    """Whether one neuron that can hold the model was up from the request's start to its end. A model that spans hosts
    needs all of them."""
    needed = all if model_of(answer.asked.model_id).spans else any
    return needed(
        not fleet.neuron(name).was_down(answer.since, answer.until, recovery_secs=SEEN_SECS)
        for name in feasible_hosts(answer.asked.model_id)
    )


def _was_barred(fleet: Fleet, answer: Answered, faults: Sequence[Fault]) -> bool:
    """Whether every host that can hold the model was down, or a fault had hit the model's engine there, so that cortex
    loaded it elsewhere. On a slow machine, where loads take long, one request sees several faults."""
    model_id = answer.asked.model_id
    hit = {
        host
        for fault in faults
        for host in fault.hosts
        if fault.model_id == model_id and fault.at <= answer.until and fault.until + BACKOFF_SECS >= answer.since
    }
    return all(
        host in hit or fleet.neuron(host).was_down(answer.since, answer.until, recovery_secs=SEEN_SECS)
        for host in feasible_hosts(model_id)
    )


def _was_hit(answer: Answered, faults: Sequence[Fault]) -> bool:
    model_id = answer.asked.model_id
    hosts = feasible_hosts(model_id) if model_of(model_id).spans else {answer.node}
    return any(
        fault.hosts.intersection(hosts) and fault.at <= answer.until and fault.until + _GRACE_SECS >= answer.since
        for fault in faults
    )
