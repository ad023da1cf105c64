"""How engines on the CPU share the host's cores. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def shared_cores(cores: Sequence[int], taken: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The cores of an engine that starts, given those of the engines that run: with n of these an equal part,
    1 / (n + 1) of all, at least one, those that the fewest others use first. An engine that is alone gets all.

    Engines that run keep theirs, since their number of threads is fixed at their start: two share the cores of the
    first, which may use all when the second is idle.
    """
    listed = list(taken)
    count = max(1, len(cores) // (len(listed) + 1)) if cores else 0
    uses = Counter(core for each in listed for core in each)
    return tuple(sorted(sorted(cores, key=lambda core: (uses[core], core))[:count]))
