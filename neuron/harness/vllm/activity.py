"""Whether a vLLM that answers its health check makes progress, from its metrics. Pure."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from neuron.harness.activity import ActivityProbe, HangDetector, RequestCounts

LONGEST_GAP_SECS = 30.0
"""Cap on the time that counts between two samples: neuron itself may have been stopped in between."""

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
class EngineSample(RequestCounts):
    """vLLM's metrics page at one moment, all label sets together; 0 for what it lacks. `running` counts sequences."""

    generated_tokens: float = 0
    prompt_tokens: float = 0
    iterations: float = 0  # counted steps of the engine
    iteration_tokens: float = 0
    first_tokens: float = 0  # requests that got their first token
    completed: float = 0  # requests that finished by themselves
    preemptions: float = 0
    kv_cache_usage: float = 0  # share, 0 to 1

    @property
    def counters(self) -> tuple[float, ...]:
        """Values that never fall while the engine lives and rise only through progress."""
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
    """The sample in a metrics page; None when it does not say how many requests run or wait."""
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


class VllmActivity(ActivityProbe[EngineSample]):
    """Reads vLLM's Prometheus metrics."""

    def sample_of(self, page: str) -> EngineSample | None:
        return sample_of(page)

    def hang_detector(self, grace_secs: float, prefill_grace_secs: float) -> HangDetector[EngineSample]:
        return VllmHangDetector(grace_secs, prefill_grace_secs)


class VllmHangDetector:
    """Detects from samples of one engine that it hangs: it has running requests, and no counter moves.

    It measures the time without progress while requests run. The clock restarts when a counter rises or the KV cache
    fills (progress), and when a counter falls (another engine answers). Time without requests does not count. Arriving
    and leaving requests are not progress: the clients of a hung engine time out and retry.

    There are two limits. While all running requests may still wait for their first token (a prefill, in which no
    counter need move), it is `prefill_grace_secs`; once one is known to generate, `grace_secs`. How many wait for their
    first token follows from the requests that arrived and the first tokens that were counted.

    Blind spot: vLLM updates its gauges with the results of a step, so an engine that hangs in its first step after
    being idle reports no running requests.
    """

    def __init__(self, grace_secs: float, prefill_grace_secs: float) -> None:
        self._grace_secs = grace_secs
        self._prefill_grace_secs = prefill_grace_secs
        self._last: EngineSample | None = None
        self._last_at = 0.0
        self._idle_secs = 0.0  # time without progress while requests ran
        self._unstarted = 0.0  # upper bound of the running requests that have no token yet

    def observe(self, sample: EngineSample | None, now: float) -> str | None:
        """See `HangDetector.observe`. A missing answer proves nothing."""
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
        # An aborted request may or may not be counted as ended: assume that it had its first token.
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
