"""The engine behind all APIs: admits requests, generates tokens at a set pace, counts, and fails on demand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from aiohttp import web

from neuron.sim.engine import tokens
from neuron.sim.engine.arguments import EngineSettings
from neuron.sim.engine.faults import Fault, die
from neuron.sim.engine.metrics import EngineMetrics, FinishReason
from neuron.sim.engine.slots import Slots

_KV_CACHE_REQUESTS = 8  # the KV cache holds this many requests of the full context length
_QUOTED_CHARACTERS = 200
_FILLER = (
    " Every word of this answer is made up, and the same question gets the same words again."
    " No weights were read to write it."
)


@dataclass(frozen=True)
class Prompt:
    """One prompt: the whole text, and the part that the answer quotes."""

    text: str
    quoted: str

    @property
    def token_count(self) -> int:
        return tokens.count(self.text)


@dataclass(frozen=True)
class Order:
    """One request: `choices` answers of `max_tokens` to each prompt."""

    model: str  # the name in the request, repeated in the answer
    prompts: tuple[Prompt, ...]
    max_tokens: int | None  # None: the engine's default length, with finish reason stop
    choices: int = 1
    streamed: bool = False

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.choices


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


def answer_pieces(model: str, prompt: Prompt, choice: int) -> Iterator[str]:
    """The endless answer to a prompt, token by token: the model's name, a quote of the prompt, filler."""
    which = f" answer {choice + 1}" if choice else ""
    opening = f'{model} (simulated){which}: "{prompt.quoted[:_QUOTED_CHARACTERS]}"'
    return itertools.chain(tokens.pieces(opening), itertools.cycle(tokens.pieces(_FILLER)))


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
        )

    def answer_length(self, order: Order) -> int:
        """Tokens of each answer: `max_tokens`, else the default length, limited by the context."""
        if order.max_tokens is not None:
            return order.max_tokens
        longest = max(prompt.token_count for prompt in order.prompts)
        return max(1, min(self.settings.answer_tokens, self.settings.max_model_len - longest))

    async def generate(self, order: Order) -> AsyncGenerator[Step, None]:
        """The tokens of all sequences, in lockstep as in a batch.

        Close the iterator (`contextlib.aclosing`) or cancel it to abort: this frees the slots and counts the abort at
        once. When the engine stops, every sequence ends with a step whose finish is "abort".
        """
        clock = asyncio.get_running_loop()
        came = clock.time()
        prompt_tokens = sum(prompt.token_count for prompt in order.prompts)
        cached = 0
        outcome: FinishReason = "abort"
        try:
            async with self.slots.take(order.sequences):
                first = clock.time() + self._prompt_secs
                length = self.answer_length(order)
                sequences = [
                    answer_pieces(order.model, prompt, choice)
                    for prompt in order.prompts
                    for choice in range(order.choices)
                ]
                for produced in range(length):
                    await self._fault_point(order, produced)
                    if not await self._pause_until(first + produced / self.settings.tokens_per_sec):
                        break
                    if produced == 0:
                        self.metrics.prompt_tokens += prompt_tokens
                        for _ in sequences:
                            self.metrics.time_to_first_token.observe(clock.time() - came)
                    last = produced == length - 1
                    finish: FinishReason | None = None
                    if last:
                        outcome = finish = "stop" if order.max_tokens is None else "length"
                    self.metrics.generation_tokens += len(sequences)
                    grown = len(sequences) + (prompt_tokens if produced == 0 else 0)
                    cached += grown
                    self._cached_tokens += grown
                    for index, sequence in enumerate(sequences):
                        yield Step(index, next(sequence), finish)
            if outcome == "abort":
                for index in range(order.sequences):
                    yield Step(index, "", "abort")
        finally:
            self._cached_tokens -= cached
            self.metrics.finish(outcome, order.sequences, clock.time() - came)

    async def answers(self, order: Order) -> list[SequenceAnswer]:
        """The complete answers of all sequences."""
        whole = [SequenceAnswer() for _ in range(order.sequences)]
        async for step in self.generate(order):
            answer = whole[step.index]
            answer.text += step.text
            answer.token_count += 1 if step.text else 0
            if step.finish is not None:
                answer.finish = step.finish
        self._check_core()
        return whole

    async def read(self, texts: list[str]) -> int:
        """Processes texts without generating (embedding, scoring): takes one slot and one time to first token.

        Returns their number of tokens.
        """
        clock = asyncio.get_running_loop()
        came = clock.time()
        outcome: FinishReason = "abort"
        try:
            async with self.slots.take(1):
                if Fault.HANG in self.settings.faults:
                    await self._pause_until(float("inf"))
                await self._pause_until(clock.time() + self._prompt_secs)
                self._check_core()
                read = sum(tokens.count(text) for text in texts)
                self.metrics.prompt_tokens += read
                outcome = "stop"
                return read
        finally:
            self.metrics.finish(outcome, 1, clock.time() - came)

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

    def _check_core(self) -> None:
        if self.core_dead:
            raise CoreDied(self.abort_message)

    def _wake(self) -> None:
        for pause in self._pauses:
            _end(pause)

    async def _fault_point(self, order: Order, produced: int) -> None:
        if order.streamed and self.settings.faults.due(Fault.DIE_MID_STREAM, produced):
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
