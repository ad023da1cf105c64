"""Upkeep that no request asks for: keeps, adds and removes replicas, and retires idle models. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.eviction import Claim
from cortex.placement.fair_queue import after
from cortex.placement.inputs import View
from cortex.placement.planner import Fit, Plan, best, likely_verdicts

IN_USE_SECS = 60.0
"""A model used this recently moves to another neuron when its own is drained."""


@dataclass(frozen=True)
class Retirement:
    """A model to remove from a node where it is no longer needed. `sleep`: it stays in host memory."""

    model_id: str
    node: str
    sleep: bool
    reason: str


@dataclass(frozen=True)
class Upkeep:
    """Loads to start, each with its reason, and models to retire."""

    loads: tuple[tuple[Plan, str], ...] = ()
    retirements: tuple[Retirement, ...] = ()


def is_kept_up(profile: ModelProfile) -> bool:
    """Whether the model needs upkeep even without requests."""
    return profile.replicas.min > 0 or profile.replicas.max > 1 or profile.idle_ttl_secs is not None


def upkeep(view: View, profiles: Iterable[ModelProfile]) -> Upkeep:
    """The steps due now for these models of the catalogue."""
    loads: list[tuple[Plan, str]] = []
    retirements: list[Retirement] = []
    for profile in profiles:
        wanted = _addition(view, profile)
        if wanted is not None:
            loads.append(wanted)
            view = after(view, wanted[0])
        retirements += _retirements(view, profile)
    return Upkeep(tuple(loads), tuple(retirements))


def _addition(view: View, profile: ModelProfile) -> tuple[Plan, str] | None:
    """Another replica where one is missing or would help; one at a time per model."""
    coming = [node for node in _holders(view, profile) if node.has_coming(profile.id)]
    if coming or view.fleet.load_of(profile.id) is not None:
        return None
    serving = [node for node in view.fleet.serving(profile.id) if not node.draining]
    if len(serving) < profile.replicas.min:
        return _gently(view, profile, f"replicas.min is {profile.replicas.min}, {len(serving)} serving")
    if not serving:
        return _off_drained(view, profile)
    since = view.pressed.get(profile.id)
    if len(serving) < profile.replicas.max and since is not None and view.now - since >= view.rules.scale_up_secs:
        why = f"each of {len(serving)} replicas has more than {view.rules.replica_target} requests"
        return _gently(view, profile, why, most=Fit.NOW)
    return None


def _off_drained(view: View, profile: ModelProfile) -> tuple[Plan, str] | None:
    """A new place for a model in use that only drained neurons serve, so that those can empty."""
    drained = view.fleet.serving(profile.id)
    in_use = any(
        view.working(profile.id, node) or view.now - view.use(profile.id, node.name).last_used < IN_USE_SECS
        for node in drained
    )
    names = ", ".join(sorted(node.name for node in drained))
    return _gently(view, profile, f"in use on drained neurons only ({names})") if in_use else None


def _gently(
    view: View, profile: ModelProfile, why: str, *, most: Fit = Fit.AFTER_DISPLACEMENT
) -> tuple[Plan, str] | None:
    """The best place that evicts only idle models: none in use, none recently loaded."""
    plan = best(likely_verdicts(view, profile))
    return None if plan is None or plan.fit > most or plan.displacement.claim is not Claim.IDLE else (plan, why)


def _retirements(view: View, profile: ModelProfile) -> Iterator[Retirement]:
    """Replicas idle for too long, least recently used first, down to the minimum."""
    if profile.id in view.waiting:
        return
    serving = view.fleet.serving(profile.id)
    idle = sorted((view.now - _used_at(view, profile.id, node), node.name) for node in serving)[::-1]
    left = len(serving)
    working = sum(view.working(profile.id, node) for node in serving)
    for idle_secs, name in idle:
        if left <= profile.replicas.min or view.working(profile.id, view.fleet.nodes[name]):
            continue
        ttl = profile.idle_ttl_secs
        if ttl is not None and idle_secs >= ttl:
            left -= 1
            yield Retirement(profile.id, name, profile.when_idle == "sleep", f"idle for {idle_secs:.0f} s")
        elif profile.replicas.max > 1 and left > 1 and idle_secs >= view.rules.scale_down_secs:
            if working > view.rules.replica_target * (left - 1):
                continue  # the remaining load would bring it back
            left -= 1
            yield Retirement(profile.id, name, False, f"one of {left + 1} replicas, idle for {idle_secs:.0f} s")


def _used_at(view: View, model_id: str, node: NodeSnapshot) -> float:
    use = view.use(model_id, node.name)
    return max(use.last_used, use.loaded_at)


def _holders(view: View, profile: ModelProfile) -> Iterator[NodeSnapshot]:
    return (node for node in view.fleet.holders(profile.id) if node.healthy and not node.draining)
