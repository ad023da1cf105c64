"""What counts as a hang, sample by sample."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neuron.harness.vllm.activity import LONGEST_GAP_SECS, EngineSample, VllmHangDetector, sample_of

GRACE, PREFILL = 10, 60
IDLE = EngineSample(running=0, waiting=0, generated_tokens=100, first_tokens=5, completed=5, ended=5)
PREFILLING = replace(IDLE, running=1)
GENERATING = replace(PREFILLING, generated_tokens=120, first_tokens=6, prompt_tokens=40)


def watch(*samples: EngineSample | None, every_secs: float = 1) -> tuple[float, str] | None:
    """When and why the detector fires. It sees a sample per second and the last one repeatedly."""
    watching = VllmHangDetector(GRACE, PREFILL)
    for tick in range(200):
        now = tick * every_secs
        reason = watching.observe(samples[min(tick, len(samples) - 1)], 1000 + now)
        if reason is not None:
            return now, reason
    return None


def test_counters_that_do_not_move_under_load_are_a_hang() -> None:
    """The clock starts at the last token."""
    moment, reason = watch(IDLE, GENERATING) or (0, "")
    assert moment == 1 + GRACE
    assert reason == "hung: 1 requests running and no token was counted for 10 s"


def test_an_idle_engine_does_not_hang() -> None:
    """Waiting requests alone are not a hang either: the scheduler may hold them back."""
    assert watch(IDLE) is None
    assert watch(GENERATING, replace(GENERATING, running=0, waiting=3)) is None


@pytest.mark.parametrize(
    "field", ["generated_tokens", "prompt_tokens", "iterations", "iteration_tokens", "preemptions"]
)
def test_any_moving_counter_is_progress(field: str) -> None:
    moving = [replace(GENERATING, **{field: 1000 + tick // 5}) for tick in range(200)]
    assert watch(IDLE, *moving) is None


def test_a_long_prefill_is_not_a_hang() -> None:
    """No counter moves after a request is admitted: the prefill limit applies."""
    moment, reason = watch(IDLE, PREFILLING) or (0, "")
    assert moment == 1 + PREFILL
    assert "none got its first token" in reason


def test_a_prefill_that_fills_the_cache_is_progress() -> None:
    assert watch(IDLE, *(replace(PREFILLING, kv_cache_usage=tick / 200) for tick in range(200))) is None


def test_a_remaining_prefill_is_not_a_hang() -> None:
    """Another request was generating and is done: the remaining one is still in its prefill."""
    both = replace(GENERATING, running=2)
    alone = replace(both, running=1, generated_tokens=130, completed=6, ended=6)
    assert watch(IDLE, GENERATING, both, alone) == (
        3 + PREFILL,
        "hung: 1 requests running and none got its first token for 60 s",
    )
    left = replace(both, running=1)  # the other was aborted, and not counted as ended
    assert (watch(IDLE, GENERATING, both, left) or (0, ""))[0] == 1 + PREFILL


def test_a_prefill_beside_a_stalled_generation_is_a_hang() -> None:
    """A generating request must progress."""
    assert (watch(IDLE, GENERATING, replace(GENERATING, running=2)) or (0, ""))[0] == 1 + GRACE


def test_retrying_clients_do_not_hide_a_hang() -> None:
    """Requests arrive and leave every few seconds; aborted ones may count as ended. Nothing else moves."""
    samples = [IDLE, GENERATING]
    for tick in range(200):
        samples.append(replace(GENERATING, running=1 + tick % 2, ended=5 + tick))
    assert watch(*samples) is not None


def test_time_without_requests_does_not_count() -> None:
    """A hang is detected across gaps in which all clients have left."""
    moment, _ = watch(*([IDLE] * 20 + [PREFILLING] * 20) * 5) or (0, "")
    assert moment == 40 * 3 + 20 + (PREFILL - 3 * 19)


def test_no_sample_proves_nothing() -> None:
    """A missing sample is neither a hang nor progress; a long gap counts only up to a limit, since neuron itself may
    have been stopped."""
    assert watch(IDLE, GENERATING, None) is None
    watching = VllmHangDetector(LONGEST_GAP_SECS + 5, 1000)
    assert watching.observe(IDLE, 0) is None
    assert watching.observe(GENERATING, 1) is None
    assert watching.observe(None, 2) is None
    assert watching.observe(GENERATING, 5000) is None
    assert watching.observe(GENERATING, 5005) is not None


def test_a_falling_counter_means_another_engine() -> None:
    """Counters that start again belong to a restarted engine and are not a hang."""
    moment, _ = watch(IDLE, *[GENERATING] * 9, EngineSample(running=1, waiting=0)) or (0, "")
    assert moment == 10 + PREFILL


def test_vllms_metrics_are_parsed() -> None:
    """Label sets are added up, braces in a model's name are fine, values that are not finite are ignored."""
    page = (
        "# HELP vllm:num_requests_running Number of requests.\n"
        'vllm:num_requests_running{engine="0",model_name="a}b"} 2.0\n'
        'vllm:num_requests_running{engine="1",model_name="a}b"} 1.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="m"} 4.0\n'
        'vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+06\n'
        'vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09\n'
        'vllm:iteration_tokens_total_count{engine="0",model_name="m"} 7.0\n'
        'vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 70.0\n'
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 3.0\n'
        'vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 2.0\n'
        'vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 6.0\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} NaN\n'
    )
    assert sample_of(page) == EngineSample(
        running=3,
        waiting=4,
        generated_tokens=1.5e6,
        iterations=7,
        iteration_tokens=70,
        first_tokens=6,
        completed=3,
        ended=5,
    )
    assert sample_of("process_cpu_seconds_total 1.0\n") is None
