"""Which paths a caller may name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from neuron.lifecycle.failure_cause import because
from shared.errors import InvalidRequest
from shared.protocol import FailureCause


async def check_below(source: str, roots: Sequence[Path], *, param: str) -> None:
    """Refuses a path outside of `roots`. Without roots, and for a name that is not a path on this host, does nothing.

    Raises:
        InvalidRequest: naming `param`, the path and the roots.
    """
    if roots and not await asyncio.to_thread(is_below, source, roots):
        listed = ", ".join(map(str, roots))
        # Another host may have other roots.
        reason, extra = f"{param}: {source!r} is outside of model_roots ({listed})", because(FailureCause.NODE)
        raise InvalidRequest(reason, param=param, extra=extra)


def is_below(source: str, roots: Sequence[Path]) -> bool:
    """True for a path whose real place is in one of `roots`, and for a name that is not a path on this host. Blocks."""
    path = Path(source)
    try:
        if not path.is_absolute() and not path.exists():
            return True
        real = path.resolve()
    except (OSError, RuntimeError):  # longer than any path; links in a circle
        return False
    return any(real.is_relative_to(root.resolve()) for root in roots)
