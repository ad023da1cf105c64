"""`python -m benchmarks.cold_start`: what cortex and neuron add to an engine's own start, and to a swap.

Two models by turns on one simulated card. Each round asks each contender in turn: for one model with no engine
running, then at once for the other, whose engine takes the first one's place. The contenders are cortex with neuron,
the engine started by hand with the same command line, environment and directory, and llama-swap if its command is
given. The engine records when it started, when its port was open and when the first byte came; it says nothing on its
output. At last many first requests at once: one load serves them all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scale.cold_fleet import (
    MODELS,
    ByHand,
    ColdStarter,
    EngineKind,
    bare_engine,
    cold_fleet,
    llama_swap,
)
from benchmarks.scale.http1 import Answer

VLLM_ARGS = ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "512"]
VLLM_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

PARTS = {
    "cold start": "from the request to the answer; no engine runs",
    "swap": "the same, while the other model's engine runs and has just answered",
    "cold start less load": "without the engine's own time to load",
    "swap less load": "without the engine's own time to load",
    "to start": "cold start: from the request to the engine's first instruction; by hand: from its start",
    "to first byte": "from the engine's open port to the first byte sent to it",
    "to request": "from the engine's open port to the request",
    "warm": "a request to the model that is loaded",
}


@dataclass
class Series:
    """What was measured with one contender: seconds, by the names in `PARTS`."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})

    def add(self, name: str, secs: float) -> None:
        self.seconds[name].append(secs)


@dataclass(frozen=True)
class Crowd:
    """Many first requests at once; seconds since they were sent."""

    count: int
    first: float
    last: float


class Measurement:
    """All rounds, by contender. Of an engine that records no times, whole times are measured only."""

    def __init__(self, kind: EngineKind) -> None:
        self.series: dict[str, Series] = {}
        self._stamps = kind.stamps

    async def round(self, contenders: Sequence[ColdStarter]) -> None:
        """One cold start and one exchange of each contender."""
        for contender in contenders:
            await self._cold(contender, MODELS[0], "cold start")
            series = self.series[contender.name]
            series.add("warm", (await contender.ask(MODELS[0])).secs)
            await self._cold(contender, MODELS[1], "swap")
            await contender.unload()

    async def _cold(self, contender: ColdStarter, model: str, part: str) -> None:
        answer = await contender.ask(model)
        series = self.series.setdefault(contender.name, Series())
        series.add(part, answer.secs)
        stamps = self._last_stamps()
        if stamps is None:
            return
        series.add(f"{part} less load", answer.secs - (stamps["listening"] - stamps["started"]))
        series.add("to first byte", stamps["first_byte"] - stamps["listening"])
        series.add("to request", stamps["first_request"] - stamps["listening"])
        if part == "cold start":
            asked = contender.started_at if isinstance(contender, ByHand) else answer.asked_at
            series.add("to start", stamps["started"] - asked)

    def _last_stamps(self) -> dict[str, float] | None:
        if self._stamps is None:
            return None
        stamps: dict[str, float] = json.loads(self._stamps.read_text(encoding="ascii").splitlines()[-1])
        return stamps


async def measure(
    kind: EngineKind, directory: Path, *, rounds: int, crowd: int, swap_command: str | None = None
) -> tuple[dict[str, Series], Crowd]:
    """All rounds with all contenders. A round before them warms the page cache and shows how neuron starts engines."""
    measurement = Measurement(kind)
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(cold_fleet(directory, kind))
        await fleet.ask(MODELS[0])
        start = fleet.engine_start()
        await fleet.unload()
        hand = ByHand(start, directory)
        stack.push_async_callback(hand.unload)
        contenders: list[ColdStarter] = [hand, fleet]
        if swap_command is not None:
            contenders.append(await stack.enter_async_context(llama_swap(directory, swap_command, start)))
        for number in range(1, rounds + 1):
            await measurement.round(contenders)
            sys.stderr.write(f"round {number} of {rounds}\n")
        asked, answers = await fleet.crowd(MODELS[0], crowd)
    return measurement.series, _crowd(asked, answers)


def _crowd(asked: float, answers: Sequence[Answer]) -> Crowd:
    ends = [answer.ended_at - asked for answer in answers]
    return Crowd(len(ends), ends[0], ends[-1])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile, in milliseconds."""
    ms = sorted(value * 1000 for value in values)
    return {"median_ms": statistics.median(ms), "p90_ms": ms[min(len(ms) - 1, len(ms) * 9 // 10)]}


def result(kind: EngineKind, series: dict[str, Series], crowd: Crowd) -> dict[str, Any]:
    """All measurements, as JSON data."""
    return {
        "engine": kind.name,
        "engine_args": kind.args,
        "rounds": len(series[ByHand.name].seconds["swap"]),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "contenders": {
            name: {part: spread(values) for part, values in each.seconds.items() if values}
            for name, each in series.items()
        },
        "crowd": {
            "requests": crowd.count,
            "first_ms": crowd.first * 1000,
            "last_after_first_ms": (crowd.last - crowd.first) * 1000,
        },
    }


def table(data: dict[str, Any]) -> str:
    """The result as Markdown: medians, 90th percentiles, and by how much each contender is slower than by hand."""
    contenders = data["contenders"]
    others = [name for name in contenders if name != ByHand.name]
    heads = [ByHand.name, *(f"{name} | added (ratio)" for name in others)]
    lines = [f"| {data['engine']} engine, {data['rounds']} rounds: median (p90) ms | {' | '.join(heads)} |"]
    lines.append("|---" * (2 + 2 * len(others)) + "|")
    for part, text in PARTS.items():
        hand = contenders[ByHand.name].get(part)
        if hand is None:
            continue
        cells = [_cell(hand)]
        for name in others:
            row = contenders[name][part]
            added, ratio = row["median_ms"] - hand["median_ms"], row["median_ms"] / hand["median_ms"]
            cells += [_cell(row), f"{added:+.1f} ({ratio:.2f}x)"]
        lines.append(f"| **{part}**: {text} | {' | '.join(cells)} |")
    crowd = data["crowd"]
    lines += [
        "",
        f"{crowd['requests']} first requests at once: first answer after {crowd['first_ms']:.1f} ms, the last "
        f"{crowd['last_after_first_ms']:.1f} ms later.",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, float]) -> str:
    return f"{row['median_ms']:.1f} ({row['p90_ms']:.1f})"


def engine_kind(name: str, directory: Path, load_secs: float) -> EngineKind:
    """The engine that records its times, the simulated one, or the real vLLM that the tests use.

    Raises:
        EnvironmentUnavailable: that vLLM is not installed and cannot be installed.
    """
    if name == "bare":
        return bare_engine(directory / "stamps", load_secs)
    if name == "sim":
        args = ["--load-secs", f"{load_secs:g}", "--ttft-ms", "0", "--tokens-per-sec", "inf"]
        return EngineKind("simulated", "sim", args)
    from tests.environment.models import tiny_qwen3  # noqa: PLC0415 - only needed here
    from tests.environment.vllm import vllm_environment  # noqa: PLC0415

    vllm = vllm_environment()
    return EngineKind("vLLM", "vllm", VLLM_ARGS, str(tiny_qwen3(vllm)), vllm.command, VLLM_ENV)


async def run(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command line asks for, as JSON data."""
    with tempfile.TemporaryDirectory(prefix="cold-start-") as name:
        kind = engine_kind(given.engine, Path(name), given.load_secs)
        measured = await measure(
            kind, Path(name), rounds=given.rounds, crowd=given.crowd, swap_command=given.llama_swap
        )
    return result(kind, *measured)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks.cold_start", description=(__doc__ or "").partition("\n\n")[2])
    found.add_argument("--engine", choices=["bare", "sim", "vllm"], default="bare", help="bare records its times")
    found.add_argument("--rounds", type=int, default=20, help="exchanges, and as many cold starts (default 20)")
    found.add_argument("--crowd", type=int, default=50, metavar="N", help="first requests at once (default 50)")
    found.add_argument("--load-secs", type=float, default=0.5, help="of the bare or simulated engine (default 0.5)")
    found.add_argument("--llama-swap", metavar="PATH", help="also measure this llama-swap")
    found.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return found


def main() -> None:
    given = parser().parse_args()
    data = asyncio.run(run(given))
    sys.stdout.write(table(data) + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
