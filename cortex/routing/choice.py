"""Chooses among replicas. Pure: takes numbers, returns an index.

A replica's work is its outstanding requests (`outstanding`) divided by its relative speed. Without a key the least work
wins, counting the new request, so an idle fast replica comes before an idle slow one. With a key the request goes where
earlier requests with that key went, because the engine has their prompt in its cache, unless that replica has too much
work: consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016) over rendezvous hashing. It keeps no
state, so all processes agree, and a replica that joins or leaves moves only its own keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

WAITING_WEIGHT: Final = 2
"""Weight of a request that is queued in the engine; a running one counts 1, because on average half of its work is
done."""

LOAD_FACTOR: Final = 1.25
"""Default for how far above the average a replica's work may be for the sake of its cache."""

_MASK: Final = (1 << 64) - 1
_MAX_NAMES: Final = 4096
_SLACK: Final = 1e-9  # rounding error of float sums
_names: Final[dict[str, int]] = {}  # node name -> 64 bits


def beyond_ours(running: int, waiting: int, ours: int) -> int:
    """An engine's work that does not come from this cortex: what its neuron reports minus our requests there (`ours`).
    With two cortexes on one fleet it is the other's. Our own queued requests add to it, because `ours` counts them as
    1. Never negative: the neuron's report may be older than our count."""
    return max(0, running + WAITING_WEIGHT * waiting - ours)


def work(outstanding: int, speed: float) -> float:
    """Time for a replica to finish one more request than it has; the unit is arbitrary."""
    return (outstanding + 1) / speed


def least_work(names: Sequence[str], outstanding: Sequence[int], speeds: Sequence[float]) -> int:
    """The index of the replica that is expected to finish the request first; ties go to the first name.

    Args:
        names: of the nodes, at least one. The other sequences have the same length and order.
        outstanding: requests there, weighted (`beyond_ours`).
        speeds: above 0; only their ratios matter.
    """
    best, best_work = 0, work(outstanding[0], speeds[0])
    for place in range(1, len(names)):
        this = work(outstanding[place], speeds[place])
        if this < best_work or (this == best_work and names[place] < names[best]):
            best, best_work = place, this
    return best


def choose(
    names: Sequence[str],
    outstanding: Sequence[int],
    speeds: Sequence[float],
    key: int | None,
    load_factor: float = LOAD_FACTOR,
) -> int:
    """The index of the replica for a request with this key; without a key, the one with the least work. Arguments as
    for `least_work`.

    A replica is skipped if this request would give it more than `load_factor` (at least 1) times its share of all
    outstanding requests, rounded up; shares are proportional to speed. A key's order of replicas ignores speed:
    otherwise every measurement would move conversations to other engines.
    """
    if key is None:
        return least_work(names, outstanding, speeds)
    share = load_factor * (sum(outstanding) + 1) / sum(speeds)
    best, best_rank = -1, -1
    for place, name in enumerate(names):
        if outstanding[place] + 1 <= math.ceil(share * speeds[place] - _SLACK):
            rank = _mixed(key, name)
            if rank > best_rank:
                best, best_rank = place, rank
    # With a factor of at least 1 some replica always has room: the bounds add up to more than all requests.
    return best if best >= 0 else least_work(names, outstanding, speeds)


def _mixed(key: int, name: str) -> int:
    """The rank of a node for a key: 64 bits that mix every bit of both (the finaliser of SplitMix64)."""
    known = _names.get(name)
    if known is None:
        if len(_names) >= _MAX_NAMES:
            _names.clear()
        known = _names[name] = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    mixed = key ^ known
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    return mixed ^ (mixed >> 31)
