"""The engine behind all APIs: admits requests, generates tokens at a set pace, counts, and fails on demand."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from aiohttp import web

from neuron.sim.engine import tokens
from neuron.sim.engine.arguments import EngineSettings
from neuron.sim.engine.faults import Fault, die
from neuron.sim.engine.metrics import EngineMetrics, FinishReason
from neuron.sim.engine.replies import Prompt, Reply, made_up
from neuron.sim.engine.slots import Slots

_KV_CACHE_REQUESTS = 8  # the KV cache holds this many requests of the full context length


@dataclass(frozen=True)
class Generation:
    """One request: `choices` answers to each prompt.

    An answer ends by itself with finish reason "stop", or with "length" after `max_tokens` or with the context.
    `ignore_eos`: it only ends in the second way.
    """

    model: str  # the name in the request, repeated in the answer
    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    choices: int = 1
    streamed: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    reply: Reply | None = None  # None: the made-up text

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.choices

    @property
    def tool(self) -> str | None:
        """The tool that every answer calls: its tokens are the arguments."""
        return None if self.reply is None else self.reply.tool


@dataclass(frozen=True)
class Step:
    """The next token of one sequence. `finish` is set with the last one (or instead of it, when aborted)."""

    index: int  # prompt number * choices + choice number
    text: str
    finish: FinishReason | None


@dataclass
class SequenceAnswer:
    """A complete answer: all steps of one sequence."""

    text: str = ""
    token_count: int = 0
    finish: FinishReason = "abort"


@dataclass
class TokenUsage:
    """Token counts of a request so far."""

    prompt_tokens: int
    completion_tokens: int = 0

    def openai(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": None,
        }


class _Sequence:
    """The tokens of one answer and where it ends."""

    def __init__(self, generation: Generation, prompt: Prompt, choice: int, settings: EngineSettings) -> None:
        if generation.reply is None:
            own, self._continuation = made_up(generation.model, prompt, choice)
        else:
            own, self._continuation = tokens.pieces(generation.reply.text), itertools.repeat(" ")
        self._own = own
        length = len(own) if generation.reply is not None or not settings.answer_tokens else settings.answer_tokens
        length = max(length, generation.min_tokens, 1)
        room = max(settings.max_model_len - prompt.token_count, 1)
        limit = room if generation.max_tokens is None else min(generation.max_tokens, room)
        self.length = limit if generation.ignore_eos else min(length, limit)
        self.finish: FinishReason = "length" if generation.ignore_eos or length > limit else "stop"

    def piece(self, number: int) -> str:
        return self._own[number] if number < len(self._own) else next(self._continuation)


class CoreDied(Exception):
    """The engine core is dead, so the answer is lost. The message is vLLM's."""


@dataclass
class SimEngine:
    """State of one simulated engine."""

    settings: EngineSettings
    metrics: EngineMetrics = field(default_factory=EngineMetrics)
    requests_seen: int = 0  # counted on arrival
    requests_open: int = 0
    core_dead: bool = False
    adapters: dict[str, str] = field(default_factory=dict)  # paths by name
    adapter_requests: Counter[str] = field(default_factory=Counter)  # running or waiting
    sleep_level: int = 0  # 0: awake; set by neuron.sim.api.sleep only
    _unhealthy: bool = False
    _hung: bool = False
    _cached_tokens: int = 0
    _stopping: bool = False
    _stalled: bool = False
    _pauses: set[asyncio.Future[None]] = field(default_factory=set)
    slots: Slots = field(init=False)

    def __post_init__(self) -> None:
        self.slots = Slots(self.settings.max_num_seqs)

    @property
    def healthy(self) -> bool:
        return not (self._unhealthy or self.core_dead or self.settings.faults.due(Fault.BAD_HEALTH, self.requests_seen))

    @property
    def abort_message(self) -> str:
        """For clients whose requests end without a complete answer."""
        if self.core_dead:
            return "EngineCore encountered an issue. See stack trace (above) for the root cause."
        return "Request was aborted: the engine is shutting down"

    @property
    def kv_cache_usage(self) -> float:
        """The share of the KV cache in use, 0 to 1."""
        return min(self._cached_tokens / (_KV_CACHE_REQUESTS * self.settings.max_model_len), 1.0)

    def exposition(self) -> str:
        """The metrics page."""
        return self.metrics.render(
            model_name=self.settings.name,
            running=self.slots.running,
            waiting=self.slots.waiting,
            kv_cache_usage=self.kv_cache_usage,
            sleep_level=self.sleep_level,
            max_loras=self.settings.max_loras,
            adapters=sorted(+self.adapter_requests),
        )

    async def generate(self, generation: Generation) -> AsyncGenerator[Step, None]:
        """The tokens of all sequences, in lockstep as in a batch.

        Close the iterator (`contextlib.aclosing`) or cancel it to abort: this frees the slots and counts the abort at
        once. When the engine stops, every unfinished sequence ends with a step whose finish is "abort".
        """
        clock = asyncio.get_running_loop()
        arrived = clock.time()
        prompt_tokens = sum(prompt.token_count for prompt in generation.prompts)
        cached = 0
        running = dict(enumerate(self._sequences(generation)))
        adapter = [generation.model] if generation.model in self.adapters else []
        self.adapter_requests.update(adapter)
        try:
            async with self.slots.take(generation.sequences):
                first = clock.time() + self._prompt_secs
                for produced in itertools.count():
                    if not running:
                        return
                    await self._fault_point(generation, produced)
                    if not await self._pause_until(first + produced / self.settings.tokens_per_sec):
                        break
                    if produced == 0:
                        self.metrics.prompt_tokens += prompt_tokens
                        for _ in running:
                            self.metrics.time_to_first_token.observe(clock.time() - arrived)
                    self.metrics.generation_tokens += len(running)
                    grown = len(running) + (prompt_tokens if produced == 0 else 0)
                    cached += grown
                    self._cached_tokens += grown
                    for index, sequence in list(running.items()):
                        last = produced + 1 == sequence.length
                        if last:
                            del running[index]
                            self.metrics.finish(sequence.finish, 1, clock.time() - arrived)
                        yield Step(index, sequence.piece(produced), sequence.finish if last else None)
            for index in running:
                yield Step(index, "", "abort")
        finally:
            self.adapter_requests.subtract(adapter)
            self._cached_tokens -= cached
            if running:
                self.metrics.finish("abort", len(running), clock.time() - arrived)

    def _sequences(self, generation: Generation) -> list[_Sequence]:
        return [
            _Sequence(generation, prompt, choice, self.settings)
            for prompt in generation.prompts
            for choice in range(generation.choices)
        ]

    async def answers(self, generation: Generation) -> list[SequenceAnswer]:
        """The complete answers of all sequences."""
        whole = [SequenceAnswer() for _ in range(generation.sequences)]
        async for step in self.generate(generation):
            answer = whole[step.index]
            answer.text += step.text
            answer.token_count += 1 if step.text else 0
            if step.finish is not None:
                answer.finish = step.finish
        self.check_core()
        return whole

    async def read(self, texts: list[str]) -> int:
        """Processes texts without generating (embedding, scoring): takes one slot and one time to first token.

        Returns their number of tokens.
        """
        clock = asyncio.get_running_loop()
        arrived = clock.time()
        outcome: FinishReason = "abort"
        try:
            async with self.slots.take(1):
                if Fault.HANG in self.settings.faults:
                    await self._pause_until(float("inf"))
                await self._pause_until(clock.time() + self._prompt_secs)
                self.check_core()
                read = sum(tokens.count(text) for text in texts)
                self.metrics.prompt_tokens += read
                outcome = "stop"
                return read
        finally:
            self.metrics.finish(outcome, 1, clock.time() - arrived)

    def stop(self) -> None:
        """Aborts every request, running and future."""
        self._stopping = True
        self._wake()

    def core_died(self) -> None:
        """Fails every request, running and future."""
        self.core_dead = True
        self.stop()

    def stall(self, stalled: bool) -> None:
        """Generates no tokens while `stalled`; new requests are still admitted."""
        self._stalled = stalled
        self._wake()

    def hang(self) -> None:
        """Stalls for good."""
        self._hung = True

    def turn_unhealthy(self) -> None:
        """`/health` returns 503 from now on; everything else works."""
        self._unhealthy = True

    @property
    def _prompt_secs(self) -> float:
        """From a request's start to its first token."""
        faults = self.settings.faults
        slow = faults.threshold(Fault.SLOW_PREFILL) if Fault.SLOW_PREFILL in faults else 0.0
        return self.settings.ttft_secs + slow

    def check_core(self) -> None:
        """
        Raises:
            CoreDied: the core is dead.
        """
        if self.core_dead:
            raise CoreDied(self.abort_message)

    def _wake(self) -> None:
        for pause in self._pauses:
            _end(pause)

    async def _fault_point(self, generation: Generation, produced: int) -> None:
        if generation.streamed and self.settings.faults.due(Fault.DIE_MID_STREAM, produced):
            await asyncio.sleep(0.05)  # lets written data reach the client
            die()
        if self.settings.faults.due(Fault.HANG, produced):
            await self._pause_until(float("inf"))

    async def _pause_until(self, moment: float) -> bool:
        """Waits until `moment` (loop time) and until nothing is stalled; False as soon as the engine stops."""
        loop = asyncio.get_running_loop()
        if moment <= loop.time():
            await asyncio.sleep(0)  # already late: yield to other tasks
        while not self._stopping and (self._stalled or self._hung or loop.time() < moment):
            await self._pause(float("inf") if self._stalled or self._hung else moment)
        return not self._stopping

    async def _pause(self, moment: float) -> None:
        """Waits until `moment` (loop time) or until the engine's state changes."""
        loop = asyncio.get_running_loop()
        pause = loop.create_future()
        timer = None if moment == float("inf") else loop.call_at(moment, _end, pause)
        self._pauses.add(pause)
        try:
            await pause
        finally:
            self._pauses.discard(pause)
            if timer is not None:
                timer.cancel()


ENGINE = web.AppKey("engine", SimEngine)
"""Where the handlers find the engine."""


def _end(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)
