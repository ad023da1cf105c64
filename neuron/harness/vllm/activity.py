"""Whether an engine that says it is well does any work, from its own counters. Pure."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

LONGEST_GAP_SECS = 30.0
"""As much of the time between two samples counts at most: whoever looks may itself have been stopped meanwhile."""

_SAMPLE = re.compile(r"^(?P<name>vllm:\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)", re.MULTILINE)
_NO_WORK = re.compile(r'finished_reason="(?:abort|error)"')
_FIELDS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:iteration_tokens_total_count": "iterations",
    "vllm:iteration_tokens_total_sum": "iteration_tokens",
    "vllm:time_to_first_token_seconds_count": "first_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
}


@dataclass(frozen=True)
class EngineSample:
    """What a metrics page of vLLM says at one moment, all label sets together; 0 for what it does not say."""

    running: int  # requests (sequences) in the present batch
    waiting: int
    generated_tokens: float = 0
    prompt_tokens: float = 0
    iterations: float = 0  # steps of the engine that were counted
    iteration_tokens: float = 0
    first_tokens: float = 0  # requests that have got their first token
    completed: float = 0  # requests that came to an end of their own
    ended: float = 0  # requests that ended in whatever way
    preemptions: float = 0
    kv_cache_usage: float = 0  # share, 0 to 1

    @property
    def counters(self) -> tuple[float, ...]:
        """What never falls while the engine lives, and rises only by work."""
        return (
            self.generated_tokens,
            self.prompt_tokens,
            self.iterations,
            self.iteration_tokens,
            self.first_tokens,
            self.completed,
            self.preemptions,
        )


def sample_of(exposition: str) -> EngineSample | None:
    """The sample in a metrics page, None when it does not say how many requests run or wait."""
    totals: defaultdict[str, float] = defaultdict(float)
    for found in _SAMPLE.finditer(exposition):
        name, value = found["name"], float(found["value"])
        if not math.isfinite(value):
            continue
        if name == "vllm:request_success_total":
            totals["ended"] += value
            if not _NO_WORK.search(found["labels"] or ""):
                totals["completed"] += value
        elif name in _FIELDS:
            totals[_FIELDS[name]] += value
    if "running" not in totals and "waiting" not in totals:
        return None
    running, waiting = round(totals.pop("running", 0)), round(totals.pop("waiting", 0))
    return EngineSample(running, waiting, **totals)


class HangWatch:
    """Tells from samples of one engine whether it is hung: it has requests running, and no counter moves.

    What counts is the time without work while requests run. It begins anew when any counter rises or the KV cache
    fills (work was done), and when a counter falls (another engine answers). Time without requests does not count.
    Requests that come or leave are no work: the clients of a hung engine time out and try again.

    Two patiences. While every running request may still be waiting for its first token (a prefill, in which nothing
    need move), it is `prefill_grace_secs`; as soon as one is known to be generating, `grace_secs`. How many wait for
    their first token follows from who came and who got one; at an idle engine it is nobody.

    What it cannot see: vLLM updates its gauges with the results of a step. An engine that hangs in its very first step
    after it was idle says that nothing runs.
    """

    def __init__(self, grace_secs: float, prefill_grace_secs: float) -> None:
        self._grace_secs = grace_secs
        self._prefill_grace_secs = prefill_grace_secs
        self._last: EngineSample | None = None
        self._last_at = 0.0
        self._idle_secs = 0.0  # time without work while requests ran
        self._unstarted = 0.0  # at most so many of the running requests have no token yet

    def observe(self, sample: EngineSample | None, now: float) -> str | None:
        """Takes a sample made at `now` (seconds of a monotonic clock); None: there was no answer, which proves nothing.

        Returns why the engine is hung, None when it is not known to be.
        """
        if sample is None:
            return None
        last, passed = self._last, min(now - self._last_at, LONGEST_GAP_SECS)
        self._last, self._last_at = sample, now
        if last is None or _fell(last, sample):
            self._idle_secs, self._unstarted = 0.0, sample.running
            return None
        if _worked(last, sample):
            self._idle_secs = 0.0
        elif last.running and sample.running:
            self._idle_secs += passed
        # Who was aborted may be counted as ended or not: in doubt it was one that had its tokens.
        came = max(sample.running - last.running + sample.ended - last.ended, 0.0)
        unstarted = self._unstarted + came - (sample.first_tokens - last.first_tokens)
        self._unstarted = min(max(unstarted, 0.0), sample.running)
        return self._verdict(sample)

    def _verdict(self, sample: EngineSample) -> str | None:
        if not sample.running:
            return None
        in_prefill = self._unstarted >= sample.running
        grace = self._prefill_grace_secs if in_prefill else self._grace_secs
        if self._idle_secs < grace:
            return None
        what = "and none got its first token" if in_prefill else "and no token was counted"
        return f"hung: {sample.running} requests running {what} for {self._idle_secs:.0f} s"


def _fell(last: EngineSample, sample: EngineSample) -> bool:
    return sample.ended < last.ended or any(
        after < before for before, after in zip(last.counters, sample.counters, strict=True)
    )


def _worked(last: EngineSample, sample: EngineSample) -> bool:
    return sample.counters != last.counters or sample.kv_cache_usage > last.kv_cache_usage
