"""`python -m neuron.sim serve MODEL …`: a simulated `vllm serve`."""

from __future__ import annotations

import os
import signal
import sys

from neuron.sim.process.core import EngineCore


def main() -> int:
    if "leave-files" not in sys.argv:
        return _serve_with_core()
    from neuron.sim.process.leftovers import LeftoverFiles  # noqa: PLC0415

    tmp = os.environ.get("TMPDIR", "/tmp")  # noqa: S108 - vLLM's default too
    files = LeftoverFiles(tmp, os.environ.get("NEURON_ENGINE_ID", ""))
    try:
        return _serve_with_core()
    finally:
        files.remove()


def _serve_with_core() -> int:
    # Before the imports below: the core keeps a copy of the memory that the server has by now.
    core = EngineCore.fork()

    def end_now(_number: int, _frame: object) -> None:
        core.kill()
        os._exit(0)

    # Also before the imports, which take most of the start: SIGTERM must work during them.
    signal.signal(signal.SIGTERM, end_now)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        from neuron.sim.engine.arguments import parse  # noqa: PLC0415

        settings = parse(sys.argv[1:])
        if settings.faults.ignores_early_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        import asyncio  # noqa: PLC0415

        from neuron.sim.process.lifecycle import run  # noqa: PLC0415

        return asyncio.run(run(settings, core))
    finally:
        core.kill()


if __name__ == "__main__":
    sys.exit(main())
