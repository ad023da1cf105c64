"""`python -m benchmarks.cold_load`: the time that cortex and neuron add to an engine's own start.

Each round starts the engine twice: by hand, with the command line, environment and directory that neuron used (read
from /proc), and with a first request to cortex. Both are measured in the same way, from outside: the process appears,
its `/health` answers 200, the first answer is complete. The difference is what we add. Then it sends many first
requests at once: one load serves them all, and the last one waits a little longer than the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.cold_fleet import EngineKind, Moments, by_hand, cold_fleet

VLLM_ARGS = ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "512"]
VLLM_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

PARTS = {
    "first request, all": "first answer through cortex and neuron",
    "by hand, all": "the same engine by hand: start, first answer",
    "added, all": "what we add",
    "added before the start": "from request to process: cortex's decision, neuron's preparations",
    "added to the start": "from process to its /health, compared with by hand: slower (+) or faster (-)",
    "added by detection": "from /health to neuron's report that the model is loaded",
    "added to the answer": "from that report to the end of the answer, minus the answer by hand",
    "warm request": "a request through cortex once the model is loaded",
}


@dataclass(frozen=True)
class Round:
    """One cold request and one start by hand; all in seconds."""

    moments: Moments
    hand_start: float
    hand_answer: float
    warm: float

    def parts(self) -> dict[str, float]:
        """The lines of the table, in seconds, by the names in `PARTS`."""
        m = self.moments
        total, hand = m.answered - m.asked, self.hand_start + self.hand_answer
        return {
            "first request, all": total,
            "by hand, all": hand,
            "added, all": total - hand,
            "added before the start": m.spawned - m.asked,
            "added to the start": (m.ready - m.spawned) - self.hand_start,
            "added by detection": m.loaded - m.ready,
            "added to the answer": (m.answered - m.loaded) - self.hand_answer,
            "warm request": self.warm,
        }


@dataclass(frozen=True)
class Crowd:
    """Many first requests at once; seconds since they were sent."""

    count: int
    engines: int
    first: float
    last: float
    by_hand: float


async def measure(kind: EngineKind, *, rounds: int, crowd: int) -> tuple[list[Round], Crowd]:
    """All rounds on one fleet. A round before them warms the page cache and shows how neuron starts the engine."""
    with tempfile.TemporaryDirectory(prefix="cold-load-") as name:
        directory = Path(name)
        done: list[Round] = []
        async with cold_fleet(directory, kind) as fleet:
            await fleet.cold_requests(1)
            start = fleet.engine_start()
            await fleet.unload()
            await by_hand(start, directory / "engine.log")
            for number in range(1, rounds + 1):
                hand_start, hand_answer = await by_hand(start, directory / "engine.log")
                moments, _ = await fleet.cold_requests(1)
                done.append(Round(moments, hand_start, hand_answer, await fleet.warm_secs()))
                await fleet.unload()
                sys.stderr.write(f"round {number}: added {done[-1].parts()['added, all'] * 1000:.0f} ms\n")
            moments, answers = await fleet.cold_requests(crowd)
            ends = [answer.ended_at - moments.asked for answer in answers]
        hand = statistics.median(entry.hand_start + entry.hand_answer for entry in done)
    return done, Crowd(crowd, moments.engines, ends[0], ends[-1], hand)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum in milliseconds."""
    ms = [value * 1000 for value in values]
    return {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}


def result(kind: EngineKind, rounds: Sequence[Round], crowd: Crowd) -> dict[str, Any]:
    """All measurements, as JSON data."""
    columns = [entry.parts() for entry in rounds]
    return {
        "engine": kind.harness,
        "engine_args": kind.args,
        "rounds": len(rounds),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "parts": {name: spread([column[name] for column in columns]) for name in PARTS},
        "crowd": {
            "requests": crowd.count,
            "engines_started": crowd.engines,
            "first_ms": crowd.first * 1000,
            "last_ms": crowd.last * 1000,
            "last_after_first_ms": (crowd.last - crowd.first) * 1000,
            "last_added_ms": (crowd.last - crowd.by_hand) * 1000,
        },
    }


def table(data: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [f"| {data['engine']} engine, {data['rounds']} rounds | median ms | min | max |", "|---|---|---|---|"]
    for name, text in PARTS.items():
        row = data["parts"][name]
        lines.append(f"| **{name}**: {text} | {row['median_ms']:.1f} | {row['min_ms']:.1f} | {row['max_ms']:.1f} |")
    crowd = data["crowd"]
    lines += [
        "",
        f"{crowd['requests']} first requests at once: {crowd['engines_started']} engine started; first answer after "
        f"{crowd['first_ms']:.1f} ms, the last {crowd['last_after_first_ms']:.1f} ms later, "
        f"{crowd['last_added_ms']:.1f} ms more than start and answer by hand.",
    ]
    return "\n".join(lines)


def engine_kind(name: str, load_secs: float) -> EngineKind:
    """The simulated engine, or the real vLLM that the tests use.

    Raises:
        EnvironmentUnavailable: that vLLM is not installed and cannot be installed.
    """
    if name == "sim":
        args = ["--load-secs", f"{load_secs:g}", "--ttft-ms", "0", "--tokens-per-sec", "inf"]
        return EngineKind("sim", args)
    from tests.environment.models import tiny_qwen3  # noqa: PLC0415 - only needed here
    from tests.environment.vllm import vllm_environment  # noqa: PLC0415

    vllm = vllm_environment()
    return EngineKind("vllm", VLLM_ARGS, str(tiny_qwen3(vllm)), vllm.command, VLLM_ENV)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.cold_load", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--engine", choices=["sim", "vllm"], default="sim")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--crowd", type=int, default=50, metavar="N", help="first requests at once (default 50)")
    parser.add_argument("--load-secs", type=float, default=1.0, help="of the simulated engine (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    given = parser.parse_args()
    kind = engine_kind(given.engine, given.load_secs)
    data = result(kind, *asyncio.run(measure(kind, rounds=given.rounds, crowd=given.crowd)))
    sys.stdout.write(table(data) + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
