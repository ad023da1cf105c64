"""`python -m neuron.sim serve MODEL …`: a simulated `vllm serve`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from neuron.sim.arguments import parse
from neuron.sim.faults import Fault


def main() -> int:
    settings = parse(sys.argv[1:])
    # Before the imports below, which take most of the start: a SIGTERM that comes meanwhile must count as well.
    if Fault.IGNORE_SIGTERM in settings.faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    from neuron.sim.lifecycle import run  # noqa: PLC0415

    return asyncio.run(run(settings))


if __name__ == "__main__":
    sys.exit(main())
