"""The engine's metrics in Prometheus text, with vLLM's names and labels."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # by level
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class LatencyHistogram:
    """Counts of observed seconds in buckets with inclusive upper bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: Mapping[str, str]) -> Iterator[str]:
        running = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            running += count
            yield f"{name}_bucket{_labels({**labels, 'le': bound})} {float(running)}"
        yield f"{name}_count{_labels(labels)} {float(running)}"
        yield f"{name}_sum{_labels(labels)} {self._sum}"


@dataclass
class EngineMetrics:
    """Counters of one engine since its start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_FINISH_REASONS, 0))
    time_to_first_token: LatencyHistogram = field(default_factory=lambda: LatencyHistogram(_TTFT_BUCKETS))
    latency: LatencyHistogram = field(default_factory=lambda: LatencyHistogram(_LATENCY_BUCKETS))

    def finish(self, reason: FinishReason, sequences: int, seconds: float) -> None:
        """Counts the end of a request's sequences, `seconds` after its arrival."""
        self.finished[reason] += sequences
        for _ in range(sequences):
            self.latency.observe(seconds)

    def render(
        self,
        *,
        model_name: str,
        running: int,
        waiting: int,
        kv_cache_usage: float,
        sleep_level: int,
        max_loras: int | None = None,
        adapters: Sequence[str] = (),
    ) -> str:
        """The whole exposition; the engine passes the gauges' current values. `adapters`: those with requests."""
        labels = {"engine": "0", "model_name": model_name}
        lines: list[str] = []

        def family(name: str, kind: str, text: str, samples: Iterator[str] | list[str]) -> None:
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples))

        for name, text, value in (
            ("vllm:num_requests_running", "Number of requests in model execution batches.", float(running)),
            ("vllm:num_requests_waiting", "Number of requests waiting to be processed.", float(waiting)),
            ("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", kv_cache_usage),
        ):
            family(name, "gauge", text, [f"{name}{_labels(labels)} {value}"])
        state = "vllm:engine_sleep_state"
        states = [
            f"{state}{_labels({**labels, 'sleep_state': name})} {float(level == sleep_level)}"
            for level, name in enumerate(_SLEEP_STATES)
        ]
        family(state, "gauge", "Engine sleep state; awake = 0 means engine is sleeping.", states)
        if max_loras is not None:
            info, names = "vllm:lora_requests_info", ",".join(adapters)
            told = {"max_lora": str(max_loras), "running_lora_adapters": names, "waiting_lora_adapters": ""}
            family(info, "gauge", "Running stats on lora requests.", [f"{info}{_labels(told)} {time.time()}"])
        for name, text, total in (
            ("vllm:prompt_tokens_total", "Number of prefill tokens processed.", self.prompt_tokens),
            ("vllm:generation_tokens_total", "Number of generation tokens processed.", self.generation_tokens),
        ):
            family(name, "counter", text, [f"{name}{_labels(labels)} {float(total)}"])
        success = "vllm:request_success_total"
        ends = [
            f"{success}{_labels({**labels, 'finished_reason': reason})} {float(number)}"
            for reason, number in self.finished.items()
        ]
        family(success, "counter", "Count of finished requests.", ends)
        for name, text, histogram in (
            ("vllm:time_to_first_token_seconds", "Time to first token in seconds.", self.time_to_first_token),
            ("vllm:e2e_request_latency_seconds", "End to end request latency in seconds.", self.latency),
        ):
            family(name, "histogram", text, histogram.lines(name, labels))
        return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
