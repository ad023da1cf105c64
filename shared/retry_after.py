"""Retry-After: how long a refused client should wait. All fixed delays and estimates are here; `ServiceError` rounds
them. Pure."""

from __future__ import annotations

import math
from typing import Final

CONTROL_PROCESS_SECS: Final = 1
"""cortex's control process is restarting, which takes about a second."""
SERVICE_STOPPING_SECS: Final = 5
"""cortex or a neuron is stopping: about the time of a restart. Another cortex behind the same load balancer can answer
sooner."""
NEURON_DOWN_SECS: Final = 5
"""A neuron is down, or its model is not ready: roughly the time until cortex notices a change."""
NO_FREE_PORT_SECS: Final = 10
"""Every port of a neuron's range is taken: one becomes free when an engine has ended."""
UNKNOWN_LOAD_SECS: Final = 10
"""A model is to be loaded and has never been loaded before, so there is no estimate."""
MEMORY_TAKEN_SECS: Final = 30
"""Models with a higher priority hold the memory: they leave when they have been idle for a while."""
LOAD_TIMED_OUT_SECS: Final = 30
"""A request has waited for the whole load time-out: the load may still succeed soon, or needs an operator."""
GROUP_STARTING_SECS: Final = 5
"""Another engine that spans several hosts starts on the same devices."""
GROUP_UNREACHABLE_SECS: Final = 30
"""Neurons cannot reach one another: it heals when a host comes back, else an operator has to act."""
LIMITS_UNKNOWN_SECS: Final = 2
"""The database with the limits does not answer."""
RUNNING_REQUEST_SECS: Final = 1
"""A limit is taken by requests that run: it is unknown when one ends."""
LONGEST_CLIENT_WAIT_SECS: Final = 60
"""A client should report a longer wait instead of sitting it out. Client packages do not agree on it: Anthropic's
sleeps for as long as it is told, even weeks, and older ones of OpenAI repeat the request at once."""
GPU_UNUSABLE_SECS: Final = 60
"""A host's driver refuses its GPUs: an operator has to act."""


def whole_seconds(secs: float) -> int:
    """`secs` as the header's value: rounded up, as a client that retries too early is refused again; at least 1."""
    return max(1, math.ceil(secs))


def until_loaded(*, remaining_secs: float | None, expected_secs: float | None, elapsed_secs: float) -> float:
    """Estimated seconds until a model is loaded.

    `remaining_secs` is the neuron's own estimate. `expected_secs` is the usual time of this load, `elapsed_secs` the
    time it has run already.
    """
    if remaining_secs is not None:
        return remaining_secs
    if expected_secs is not None:
        return expected_secs - elapsed_secs
    return UNKNOWN_LOAD_SECS


def until_retry(at: float, now: float) -> float:
    """Seconds until a failed load is attempted again. Both are times of one clock."""
    return at - now
