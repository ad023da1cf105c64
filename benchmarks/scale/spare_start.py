"""`python -m benchmarks.scale.spare_start`: what a spare process saves of a load of real vLLM on the CPU.

Two neurons, one with `spare = true` and one without. Each round loads a model with each of them by turns, asks the same
question, compares the answers byte for byte and unloads. Before its load the first waits until its spare is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.scale.http1 import Answer, Connection, until_answers
from benchmarks.scale.services import free_ports, service
from shared.tasks import timeout
from tests.environment.models import tiny_qwen3
from tests.environment.vllm import vllm_environment

MODEL = "bench/model"
ARGS = ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "512"]
QUESTION = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Name the colours of the rainbow."}],
    "temperature": 0,
    "max_tokens": 48,
    "min_tokens": 48,
    "logprobs": True,
}
_HOST = "127.0.0.1"
_SPARE_SECS = 300.0


@dataclass
class Contender:
    """A neuron; `secs` are its loads, from the request to the answer that says loaded."""

    name: str
    port: int
    spare: bool
    source: str
    secs: list[float] = field(default_factory=list)

    async def load(self) -> bytes:
        """Loads the model and returns its answer to `QUESTION`, without the id and the time."""
        if self.spare:
            await self._until_spare()
        command = {"model_id": MODEL, "harness": "vllm", "source": self.source}
        loaded = await self._post("/models/load", command)
        self.secs.append(loaded.secs)
        told = loaded.json()
        engine = urlsplit(told["url"])
        key = {"Authorization": f"Bearer {told['api_key']}"} if told.get("api_key") else {}
        connection = Connection(engine.hostname or _HOST, engine.port or 80)
        answer = _checked(await connection.post("/v1/chat/completions", QUESTION, **key))
        connection.close()
        return json.dumps([answer.json()["choices"], answer.json()["usage"]]).encode()

    async def unload(self) -> None:
        await self._post("/models/unload", {"model_id": MODEL})

    async def _post(self, path: str, body: dict[str, Any]) -> Answer:
        connection = Connection(_HOST, self.port)
        try:
            return _checked(await connection.post(path, body))
        finally:
            connection.close()

    async def _until_spare(self) -> None:
        async with timeout(_SPARE_SECS):
            while True:
                health = await until_answers(_HOST, self.port, "/health", within_secs=30)
                if any(spare["state"] == "ready" for spare in health.json()["spares"]):
                    return
                await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def contenders(directory: Path, extra_env: dict[str, str]) -> AsyncIterator[list[Contender]]:
    """Both neurons, running; their engines have been started once, so that files are cached and the spare is made."""
    vllm = vllm_environment()
    source = str(tiny_qwen3(vllm))
    env = {"HF_HUB_OFFLINE": "1", **extra_env}
    made = []
    with contextlib.ExitStack() as stack:
        for spare in (False, True):
            name = "with a spare" if spare else "without"
            config = directory / f"{name.replace(' ', '-')}.toml"
            (port,) = free_ports(1)
            config.write_text(
                f'name = "bench"\nport = {port}\nstate_dir = {json.dumps(str(config.with_suffix("")))}\n'
                f"[harness.vllm]\ncommand = {json.dumps(vllm.command)}\nextra_args = {json.dumps(ARGS)}\n"
                f"spare = {str(spare).lower()}\n[harness.vllm.env]\n"
                + "".join(f"{key} = {json.dumps(value)}\n" for key, value in env.items()),
                encoding="utf-8",
            )
            stack.enter_context(service("neuron", config))
            await until_answers(_HOST, port, "/health", within_secs=30)
            contender = Contender(name, port, spare=False, source=source)
            await contender.load()
            await contender.unload()
            contender.secs.clear()
            contender.spare = spare
            made.append(contender)
        yield made


async def run(rounds: int, extra_env: dict[str, str]) -> list[Contender]:
    """All rounds. Raises RuntimeError if two answers differ."""
    with tempfile.TemporaryDirectory(prefix="spare-start-") as name:
        async with contenders(Path(name), extra_env) as both:
            for number in range(1, rounds + 1):
                answers = []
                for contender in both:
                    answers.append(await contender.load())
                    await contender.unload()
                if len(set(answers)) != 1:
                    raise RuntimeError(f"round {number}: the answers differ: {answers}")
                sys.stderr.write(
                    f"round {number}: {', '.join(f'{each.secs[-1]:.1f} s {each.name}' for each in both)}\n"
                )
    return both


def table(both: list[Contender]) -> str:
    """The result as Markdown."""
    plain, spare = (statistics.median(each.secs) for each in both)
    saved = plain - spare
    cells = [f"{statistics.median(each.secs):.1f} ({min(each.secs):.1f} to {max(each.secs):.1f})" for each in both]
    return (
        f"| {len(both[0].secs)} rounds: median (range), s | without | with a spare | saved |\n|---|---|---|---|\n"
        f"| from the load request to loaded | {cells[0]} | {cells[1]} | {saved:.1f} s, {saved / plain:.0%} |\n\n"
        f"The answers were the same, byte for byte. Load average {os.getloadavg()[0]:.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.scale.spare_start", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--rounds", type=int, default=5, help="loads of each (default 5)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of the engines")
    given = parser.parse_args()
    extra_env = dict(pair.split("=", 1) for pair in given.env)
    sys.stdout.write(table(asyncio.run(run(given.rounds, extra_env))) + "\n")


def _checked(answer: Answer) -> Answer:
    """Raises RuntimeError if it has not the status 200."""
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.body[:2000]!r}")
    return answer


if __name__ == "__main__":
    main()
