"""What the control tells a worker about where a request may go, and what it hears back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shared.errors import UpstreamError


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that has the model. `url` is its base URL; `others` is the work there that is not this cortex's, by its
    neuron's last report (`choice.beyond_ours`).

    `fresh`: the neuron has just been asked for the endpoint. A remembered one may have moved since.
    """

    model_id: str
    node: str
    url: str
    api_key: str | None = None
    others: int = 0
    fresh: bool = False


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that gave no answer."""

    replica: Replica
    reason: str


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes. `cold`: it had to wait for the model to be loaded."""

    replica: Replica
    cold: bool = False


def unreachable(model_id: str, failures: Sequence[Failure]) -> UpstreamError:
    """The error when no replica is left to try."""
    reasons = {failure.replica.node: failure.reason for failure in failures}
    tried = "; ".join(f"{node}: {reason}" for node, reason in reasons.items()) or "the fleet keeps changing"
    return UpstreamError(f"no engine with {model_id!r} can be reached ({tried})", code="upstream_unreachable")
