"""Three mismatched replicas in virtual time: how the choice affects waiting times. Pure and seeded.

    python -m tests.cortex.replicas_simulated

prints the tables of docs/relay.md. An engine runs so many requests at a time as it has slots, each the slower the more
there are; others wait in its queue, in order. Its neuron tells of both every two seconds, and by then they are a second
old.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from cortex.routing.choice import beyond_ours, choose, least_work
from cortex.routing.replica import ReplicaKey
from cortex.routing.speeds import Speeds

NODES = ["a", "b", "c"]
SPEEDS = [1.0, 2.0, 4.0]
BY_MEMORY = (8, 16, 32)
"""Slots of cards of 12, 24 and 48 GB, say: a faster one mostly has more room for requests too."""
EQUAL = (16, 16, 16)
CROWD = 32
"""So many requests at a time halve the speed of each: a batch costs little until the GPU is full."""
LOOK_SECS = 1.0
"""How often a neuron looks at its engine. Every second time it reports what it saw the time before."""
BYTES_PER_SEC = 1000.0
"""Of one answer, alone on an engine of speed 1."""
MEAN_BYTES = 8000.0
TURNS = 6
"""Of a conversation."""
MODEL = "m"
KEYS = [ReplicaKey(MODEL, name, "") for name in NODES]
PATH = b"/v1/chat/completions"


@dataclass(order=True)
class Job:
    """A request; `ends_at` is in bytes that its engine has made for each request that runs."""

    ends_at: float
    number: int
    arrived: float = field(compare=False)
    size: float = field(compare=False)
    started: float = field(compare=False, default=0.0)


class Engine:
    """Advances from event to event; times are seconds."""

    def __init__(self, speed: float, slots: int) -> None:
        self.speed = speed
        self.slots = slots
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self._made = 0.0  # bytes for each request that ran all the time
        self._now = 0.0

    @property
    def outstanding(self) -> int:
        return len(self.running) + len(self.waiting)

    def rate(self, running: int) -> float:
        """Bytes a second for each of this many requests."""
        return BYTES_PER_SEC * self.speed / (1 + running / CROWD)

    def _rate(self) -> float:
        return self.rate(len(self.running))

    def next_end(self) -> float:
        """When its next answer is complete, if no request arrives before."""
        if not self.running:
            return float("inf")
        return self._now + (self.running[0].ends_at - self._made) / self._rate()

    def advance(self, now: float) -> None:
        self._made += (now - self._now) * self._rate()
        self._now = now

    def take(self, job: Job) -> None:
        if len(self.running) == self.slots:
            self.waiting.append(job)
            return
        job.started = self._now
        job.ends_at = self._made + job.size
        heapq.heappush(self.running, job)

    def finish(self) -> Job:
        job = heapq.heappop(self.running)
        if self.waiting:
            self.take(self.waiting.popleft())
        return job


Policy = Callable[["Simulation", int], int]
"""(simulation, key of the conversation) -> place of the engine."""


class Simulation:
    """Requests arrive at random at a share `load` of what the engines can do together."""

    def __init__(self, policy: Policy, load: float, *, slots: tuple[int, ...] = BY_MEMORY, seed: int = 1) -> None:
        self.engines = [Engine(speed, most) for speed, most in zip(SPEEDS, slots, strict=True)]
        self.speeds = Speeds()
        self.others = [0 for _ in SPEEDS]
        self._policy = policy
        self._random = random.Random(seed)
        most = sum(engine.slots * engine.rate(engine.slots) for engine in self.engines)
        self._pause = MEAN_BYTES / (most * load)
        self._last: dict[int, int] = {}
        self.waits: list[float] = []
        self.times: list[float] = []
        self.kept: list[bool] = []

    @property
    def ours(self) -> list[int]:
        return [engine.outstanding for engine in self.engines]

    def run(self, requests: int) -> Simulation:
        now, next_look, number = 0.0, LOOK_SECS, 0
        seen: list[tuple[int, int]] | None = None
        arrival = self._random.expovariate(1 / self._pause)
        conversations = [self._random.getrandbits(64) for _ in range(60)]
        while number < requests:
            ends = [engine.next_end() for engine in self.engines]
            now = min(arrival, next_look, *ends)
            for engine in self.engines:
                engine.advance(now)
            if now == arrival:
                which = self._random.randrange(len(conversations))
                self._arrive(Job(0.0, number, now, self._size()), conversations[which])
                if self._random.random() < 1 / TURNS:
                    conversations[which] = self._random.getrandbits(64)
                number += 1
                arrival = now + self._random.expovariate(1 / self._pause)
            elif now == next_look:
                next_look += LOOK_SECS
                if seen is None:
                    seen = [(len(engine.running), len(engine.waiting)) for engine in self.engines]
                    continue
                self.others = [beyond_ours(*then, ours) for then, ours in zip(seen, self.ours, strict=True)]
                seen = None
            else:
                self._end(ends.index(now), now)
        return self

    def _size(self) -> float:
        return MEAN_BYTES * self._random.lognormvariate(-0.5, 1.0)

    def _arrive(self, job: Job, key: int) -> None:
        place = self._policy(self, key)
        if key in self._last:
            self.kept.append(self._last[key] == place)
        self._last[key] = place
        self.engines[place].take(job)

    def _end(self, place: int, now: float) -> None:
        job = self.engines[place].finish()
        self.waits.append(job.started - job.arrived)
        self.times.append(now - job.arrived)
        self.speeds.learn((MODEL, PATH, True), KEYS[place], now - job.arrived, int(job.size) + 1)


def least_in_flight(simulation: Simulation, key: int) -> int:
    """The simplest choice: our own requests, then the name."""
    return least_work(NODES, simulation.ours, [1.0, 1.0, 1.0])


def ideal(simulation: Simulation, key: int) -> int:
    """A chooser that knows how fast each replica is."""
    return least_work(NODES, simulation.ours, SPEEDS)


def _outstanding(simulation: Simulation) -> list[int]:
    return [ours + others for ours, others in zip(simulation.ours, simulation.others, strict=True)]


def learned(simulation: Simulation, key: int) -> int:
    """Cortex, for requests without a key."""
    return choose(NODES, _outstanding(simulation), simulation.speeds.of(KEYS), None)


def with_affinity(simulation: Simulation, key: int) -> int:
    """Cortex, for conversations."""
    return choose(NODES, _outstanding(simulation), simulation.speeds.of(KEYS), key)


POLICIES = {
    "least in flight": least_in_flight,
    "speeds known": ideal,
    "speeds learned": learned,
    "with affinity": with_affinity,
}


def main() -> None:
    print("| slots | load | choice | mean wait, s | mean time, s | p99 time, s | turns where the last was |")
    print("|---|---|---|---|---|---|---|")
    for slots, load in ((BY_MEMORY, 0.5), (BY_MEMORY, 0.8), (BY_MEMORY, 0.95), (EQUAL, 0.8), (EQUAL, 0.95)):
        for name, policy in POLICIES.items():
            done = Simulation(policy, load, slots=slots).run(20_000)
            times = sorted(done.times)
            print(
                f"| {', '.join(map(str, slots))} | {load:.0%} | {name} | {fmean(done.waits):.2f} | {fmean(times):.2f}"
                f" | {times[len(times) * 99 // 100]:.1f} | {fmean(done.kept):.0%} |"
            )


if __name__ == "__main__":
    main()
