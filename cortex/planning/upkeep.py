"""What is to be done without anybody waiting: replicas kept, added and removed, idle models sent away. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cortex.catalogue import ModelProfile
from cortex.planning.displacement import Claim
from cortex.planning.plan import Fit, Plan, best, likely_verdicts
from cortex.planning.turns import after
from cortex.planning.view import View
from cortex.snapshot import NodeSnapshot


@dataclass(frozen=True)
class Retirement:
    """A model that leaves a node, because nobody needs it there. `sleep`: it stays in the host's memory."""

    model_id: str
    node: str
    sleep: bool
    reason: str


@dataclass(frozen=True)
class Upkeep:
    """Loads to begin, each with the reason for it, and models to send away."""

    loads: tuple[tuple[Plan, str], ...] = ()
    retirements: tuple[Retirement, ...] = ()


def is_kept_up(profile: ModelProfile) -> bool:
    """True for models that need to be looked at without anybody's asking for them."""
    return profile.replicas.min > 0 or profile.replicas.max > 1 or profile.idle_ttl_secs is not None


def upkeep(view: View, profiles: Iterable[ModelProfile]) -> Upkeep:
    """The steps that are due now for these models of the catalogue."""
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
    """Another replica, where one is missing or would help. One at a time for each model."""
    coming = [node for node in _holders(view, profile) if node.has_coming(profile.id)]
    if coming or any(each.model_id == profile.id for each in view.fleet.reservations):
        return None
    serving = [node for node in view.fleet.serving(profile.id) if not node.draining]
    if len(serving) < profile.replicas.min:
        plan = best(likely_verdicts(view, profile))
        if plan is None or plan.fit is Fit.TOO_LARGE or plan.displacement.claim is not Claim.IDLE:
            return None
        return plan, f"replicas.min is {profile.replicas.min}, {len(serving)} serve"
    since = view.pressed.get(profile.id)
    pressed = since is not None and view.now - since >= view.rules.scale_up_secs
    if not serving or len(serving) >= profile.replicas.max or not pressed:
        return None
    plan = best(likely_verdicts(view, profile))
    if plan is None or plan.fit > Fit.NOW:
        return None
    return plan, f"each of {len(serving)} replicas has more than {view.rules.replica_target} requests"


def _retirements(view: View, profile: ModelProfile) -> Iterator[Retirement]:
    """Replicas that have been idle for too long, the least recently used first, down to the minimum."""
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
                continue  # another would be loaded again for what the rest have to do
            left -= 1
            yield Retirement(profile.id, name, False, f"one of {left + 1} replicas, idle for {idle_secs:.0f} s")


def _used_at(view: View, model_id: str, node: NodeSnapshot) -> float:
    use = view.use(model_id, node.name)
    return max(use.last_used, use.loaded_at)


def _holders(view: View, profile: ModelProfile) -> Iterator[NodeSnapshot]:
    return (node for node in view.fleet.holders(profile.id) if node.healthy and not node.draining)
