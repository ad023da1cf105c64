"""Which of several replicas gets a request. Pure: numbers in, a place in the list out.

The work of a replica is what it has outstanding (`outstanding`), divided by its speed beside the others. Without a key
the least work wins, with the request itself counted: so a fast one that is idle comes before a slow one. With a key the
request goes where those of the same key went, so that an engine finds the prompt in its cache, unless that replica has
too much to do: consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016) over rendezvous hashing.
Nothing of it is remembered, so all processes agree, and a replica that comes or goes takes only its own keys along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

WAITING_WEIGHT: Final = 2
"""Of a request that waits inside the engine, beside one that runs: on average a running one has half of its work
behind it, a waiting one none."""

LOAD_FACTOR: Final = 1.25
"""How far above the average a replica may be for the sake of its cache, unless it is configured otherwise."""

_MASK: Final = (1 << 64) - 1
_MAX_NAMES: Final = 4096
_SLACK: Final = 1e-9  # what sums of floats may be off
_names: Final[dict[str, int]] = {}  # node name -> 64 bits


def beyond_ours(running: int, waiting: int, ours: int) -> int:
    """The work of an engine that is not ours: what its neuron has just told of, less what we had there then. With two
    cortexes before one fleet it is the other's. Requests of ours that wait there add to it: they are counted as one
    where they weigh more. Never negative: what a neuron tells may be older than our count."""
    return max(0, running + WAITING_WEIGHT * waiting - ours)


def work(outstanding: int, speed: float) -> float:
    """When a replica is done with one request more than it has, in units that only compare."""
    return (outstanding + 1) / speed


def least_work(names: Sequence[str], outstanding: Sequence[int], speeds: Sequence[float]) -> int:
    """The replica that is done with the request first, by what is known; of equals the first by name.

    Args:
        names: of the nodes, at least one; the others have the same length and order.
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
    """The replica for a request with this key; without one, that with the least work. Arguments as for `least_work`.

    A replica is passed over when with this request it would have more than `load_factor` (at least 1) times its share
    of all that is outstanding, rounded up; shares are by speed. The order of a key's replicas is not by speed: it
    would change with every measurement, and conversations with it.
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
    # Whole numbers always leave one (the bounds add up to more than there is); a factor below 1 might not.
    return best if best >= 0 else least_work(names, outstanding, speeds)


def _mixed(key: int, name: str) -> int:
    """The rank of a node for a key: 64 bits in which every bit of both counts (the finaliser of SplitMix64)."""
    known = _names.get(name)
    if known is None:
        if len(_names) >= _MAX_NAMES:
            _names.clear()
        known = _names[name] = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    mixed = key ^ known
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    return mixed ^ (mixed >> 31)
