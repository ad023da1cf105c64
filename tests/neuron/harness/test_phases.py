"""vLLM's output during its start, read as phases. `vllm_logs/` has real output of vLLM 0.32 on a CPU; the other lines
are real output of other versions on GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from neuron.harness.registry import HARNESSES
from neuron.harness.vllm.phases import VllmLoadReading
from neuron.progress.phases import PHASES, rank

LOGS = Path(__file__).parent / "vllm_logs"


def replay(lines: Iterable[str]) -> list[VllmLoadReading]:
    """The reading after each line."""
    readings = [VllmLoadReading()]
    for line in lines:
        readings.append(readings[-1].after(line))
    return readings


def phases_of(readings: Iterable[VllmLoadReading]) -> list[str]:
    return list(dict.fromkeys(reading.phase for reading in readings))


def check_never_back(readings: list[VllmLoadReading]) -> None:
    for before, after in pairwise(readings):
        assert rank(before.phase) <= rank(after.phase)
        if before.phase == after.phase:
            assert (before.fraction or 0) <= (after.fraction or 0)


@pytest.mark.parametrize(
    ("log", "phases"),
    [
        ("badflag", ["starting"]),
        ("badvalue", ["starting"]),
        ("nopath", ["starting"]),
        ("offline", ["starting"]),
        ("sleep", ["starting"]),
        ("toolong", ["starting"]),
        ("tp2", ["starting"]),
        ("kv", ["starting", "loading weights"]),
    ],
)
def test_real_failures(log: str, phases: list[str]) -> None:
    """The phases before the failure: `Enforce eager set, disabling torch.compile` compiles nothing."""
    readings = replay((LOGS / f"{log}.txt").read_text().splitlines())
    assert phases_of(readings) == phases
    assert not any(reading.serving for reading in readings)
    check_never_back(readings)


SHARDS = "Loading safetensors checkpoint shards"
CAPTURE = "Capturing CUDA graphs"
CORE = "(EngineCore pid=7) INFO 04-24 12:14:36 "
V0_19 = [
    "INFO 04-24 12:14:28 [model.py:549] Resolved architecture: Qwen3ForCausalLM",
    f"{CORE}[core.py:105] Initializing a V1 LLM engine (v0.19.1) with config: model='m', enforce_eager=False, "
    "compilation_config={'cudagraph_mode': <CUDAGraphMode.FULL_AND_PIECEWISE: (2, 1)>}",
    f"{CORE}[gpu_model_runner.py:4735] Starting to load model m...",
    f"{CORE}[weight_utils.py:581] Time spent downloading weights for org/m: 5.324776 seconds",
    f"(EngineCore pid=7) {SHARDS}:   0% Completed | 0/2 [00:00<?, ?it/s]",
    f"(EngineCore pid=7) {SHARDS}:  50% Completed | 1/2 [00:00<00:00, 12.69it/s]",
    f"(EngineCore pid=7) {SHARDS}: 100% Completed | 2/2 [00:00<00:00, 12.69it/s]",
    f"{CORE}[default_loader.py:384] Loading weights took 0.08 seconds",
    f"{CORE}[gpu_model_runner.py:4820] Model loading took 0.53 GiB memory and 7.125418 seconds",
    f"{CORE}[backends.py:1051] Using cache directory: /x/backbone for vLLM's torch.compile",
    f"{CORE}[backends.py:1111] Dynamo bytecode transform time: 3.72 s",
    f"{CORE}[backends.py:390] Compiling a graph for compile range (1, 8192) takes 6.11 s",
    f"{CORE}[monitor.py:48] torch.compile took 10.78 s in total",
    f"{CORE}[gpu_model_runner.py:5876] Profiling CUDA graph memory: PIECEWISE=51 (largest=512), FULL=35 (largest=256)",
    f"{CORE}[gpu_worker.py:436] Available KV cache memory: 26.87 GiB",
    f"{CORE}[kv_cache_utils.py:1319] GPU KV cache size: 251,584 tokens",
    f"(EngineCore pid=7) {CAPTURE} (mixed prefill-decode, PIECEWISE):   0%|          | 0/51 [00:00<?, ?it/s]"
    f"{CAPTURE} (mixed prefill-decode, PIECEWISE): 100%|██████████| 51/51 [00:00<00:00, 107.93it/s]",
    f"(EngineCore pid=7) {CAPTURE} (decode, FULL):   0%|          | 0/35 [00:00<?, ?it/s]",
    f"(EngineCore pid=7) {CAPTURE} (decode, FULL):  40%|████      | 14/35 [00:00<00:00, 118.64it/s]",
    f"{CORE}[gpu_model_runner.py:6046] Graph capturing finished in 2 secs, took 0.27 GiB",
    f"{CORE}[core.py:283] init engine (profile, create kv cache, warmup model) took 58.09 seconds",
    "(APIServer pid=1) INFO 04-24 12:15:43 [api_server.py:5] Starting vLLM server on http://127.0.0.1:8000",
    "(APIServer pid=1) INFO:     Application startup complete.",
]
V0_8 = [
    "INFO 04-09 02:05:36 [core.py:58] Initializing a V1 LLM engine (v0.8.3) with config: model='m'",
    "INFO 04-09 02:05:36 [gpu_model_runner.py:1258] Starting to load model m...",
    "Loading pt checkpoint shards:  50% Completed | 1/2 [00:00<00:00, 12.69it/s]",
    "INFO 04-09 02:06:09 [gpu_model_runner.py:1273] Model loading took 61.0374 GiB and 33.525153 seconds",
    "INFO 04-09 02:06:09 [backends.py:426] Dynamo bytecode transform time: 16.61 s",
    "INFO 04-09 02:06:10 [backends.py:115] Directly load the compiled graph for shape None from the cache",
    "INFO 04-09 02:06:25 [monitor.py:33] torch.compile takes 16.61 s in total",
    "INFO 04-09 02:06:28 [kv_cache_utils.py:578] GPU KV cache size: 10,000 tokens",
    "Capturing CUDA graph shapes:  50%|█████     | 33/67 [00:10<00:10,  3.19it/s]",
    "INFO 04-09 02:06:50 [gpu_model_runner.py:1608] Graph capturing finished in 21 secs, took 0.63 GiB",
    "INFO 04-09 02:06:50 [api_server.py:1081] Starting vLLM API server on http://0.0.0.0:8000",
]
EAGER = [
    "(APIServer pid=1) WARNING 11-24 16:44:43 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs",
    "(Worker pid=2) INFO 11-24 16:45:04 [cpu_model_runner.py:68] Starting to load model tiny...",
    f"{SHARDS}: 100% Completed | 1/1 [00:00<00:00, 251.07it/s]",
    "(Worker pid=2) INFO 11-24 16:45:05 [default_loader.py:501] Loading weights took 0.01 seconds",
    "(EngineCore pid=3) INFO 11-24 16:45:06 [kv_cache_utils.py:1711] GPU KV cache size: 1,024 tokens",
    "(EngineCore pid=3) INFO 11-24 16:45:07 [core.py:1] init engine (profile, create kv cache, warmup model) took 2 s",
]


@pytest.mark.parametrize(
    ("lines", "phases"),
    [
        (V0_19, ["starting", "loading weights", "compiling", "capturing graphs", "warming up"]),
        (V0_8, ["starting", "loading weights", "compiling", "capturing graphs", "warming up"]),
        (EAGER, ["starting", "loading weights", "warming up"]),
    ],
)
def test_whole_starts(lines: list[str], phases: list[str]) -> None:
    """All phases are seen in order, without those that the engine skips."""
    readings = replay(lines)
    assert phases_of(readings) == phases
    check_never_back(readings)
    assert [reading.serving for reading in readings][-1] == ("Starting vLLM" in lines[-1] or "complete" in lines[-1])


def test_fractions_of_a_start() -> None:
    """Shards and graphs have a fraction, over both captures if there are two, and a download has its duration."""
    readings = replay(V0_19)
    by_phase = {phase: [r.fraction for r in readings if r.phase == phase] for phase in PHASES}
    assert by_phase["loading weights"] == [None, 0, 0.5, 1, 1]
    assert by_phase["capturing graphs"] == [0.5, 0.5, 0.7]
    assert readings[-1].downloaded_secs == 5.324776
    assert replay(V0_8)[9].fraction == 0.5
    runner_v2 = [V0_19[1], f"{CAPTURE} (PIECEWISE):  50%|#| 1/2", f"{CAPTURE} (FULL):  50%|#| 1/2"]
    assert [reading.fraction for reading in replay(runner_v2)[2:]] == [0.25, 0.75]


@pytest.mark.parametrize(
    "bar",
    [
        "Loading np_cache checkpoint shards",
        "Multi-thread loading pt checkpoint shards",
        "Multi-thread loading shards",
        "Loading safetensors using Runai Model Streamer",
        "Loading safetensors using InstantTensor loader",
        "Loading safetensors using Fastsafetensor loader",
    ],
)
def test_every_loader_has_its_bar(bar: str) -> None:
    reading = VllmLoadReading().after(f"(Worker_TP0 pid=7) {bar}:  25% Completed | 1/4 [00:00<00:00,  4.02it/s]")
    assert (reading.phase, reading.fraction) == ("loading weights", 0.25)


def test_downloads_count_weight_files_together() -> None:
    """Several bars at once, of the number of files that their names give; small files do not count."""
    bar = "{}: {:3d}%|█▏        | 598M/4.98G [00:03<00:25, 171MB/s]"
    first, second = "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"
    readings = replay(
        [
            bar.format("tokenizer.json", 50),
            "Starting to load model org/m...",
            bar.format(first, 0),
            bar.format(second, 40),
            bar.format(first, 100),
            bar.format(second, 20),
            bar.format("(…)del-00003-of-00004.safetensors", 100),
            f"{SHARDS}:  25% Completed | 1/4",
            bar.format(first, 100),
        ]
    )
    assert [(r.phase, r.fraction) for r in readings[2:]] == [
        ("starting", None),
        ("downloading", 0.0),
        ("downloading", 0.1),
        ("downloading", 0.35),
        ("downloading", 0.35),
        ("downloading", 0.55),
        ("loading weights", 0.25),
        ("loading weights", 0.25),
    ]
    assert replay(["Fetching 4 files:  25%|██▌       | 1/4 [00:10<00:30]"])[-1].fraction == 0.25


def test_output_of_several_workers() -> None:
    """Bars of two workers, interleaved: the further one counts, and no phase is repeated."""

    def worker(rank_: int, text: str) -> str:
        return f"(Worker_TP{rank_} pid={rank_}) {text}"

    record = "INFO 06-21 07:20:11 [x.py:1] "
    readings = replay(
        [
            worker(0, f"{record}Starting to load model m..."),
            worker(0, f"{SHARDS}:  25% Completed | 1/4"),
            worker(1, f"{record}Starting to load model m..."),
            worker(1, f"{SHARDS}:   0% Completed | 0/4"),
            worker(0, f"{SHARDS}:  75% Completed | 3/4"),
            worker(1, f"{SHARDS}:  50% Completed | 2/4"),
            worker(0, f"{record}Model loading took 8.1 GiB memory and 20 seconds"),
            worker(1, f"{SHARDS}: 100% Completed | 4/4"),
            worker(1, f"{record}Model loading took 8.1 GiB memory and 24 seconds"),
            worker(0, f"{CAPTURE} (decode, FULL):  50%|#####     | 5/10"),
            worker(1, f"{record}torch.compile took 5.00 s in total"),
            worker(1, f"{CAPTURE} (decode, FULL):  20%|##        | 2/10"),
        ]
    )
    check_never_back(readings)
    assert phases_of(readings) == ["starting", "loading weights", "compiling", "capturing graphs"]
    assert [r.fraction for r in readings if r.phase == "loading weights"] == [0.25, 0.25, 0.25, 0.75, 0.75]
    assert readings[-1].fraction == 0.5


def test_messages_quote_the_engine() -> None:
    """The record's prefix is cut off, for all versions; unrelated lines change nothing."""
    assert VllmLoadReading().after(V0_19[0]).message == "Resolved architecture: Qwen3ForCausalLM"
    assert VllmLoadReading().after(V0_19[2]).message == "Starting to load model m..."
    assert VllmLoadReading().after("(APIServer pid=9) INFO 11-23 11:11:55 [m.py:6] hello") == VllmLoadReading()
    assert len(VllmLoadReading().after("Starting to load model " + "m" * 500).message or "") == 200


@pytest.mark.parametrize("name", ["vllm", "sim"])
def test_harnesses_share_the_reading(name: str) -> None:
    """vLLM and its simulation print the same lines."""
    harness = HARNESSES["vllm" if name == "vllm" else "sim"]
    reading = harness.first_reading()
    assert (reading.phase, reading.fraction, reading.message, reading.serving) == ("starting", None, None, False)
    assert reading.after(V0_8[2]).fraction == 0.5


def test_records_in_json_tell_the_phases() -> None:
    """Real output of vLLM 0.32 with VLLM_LOGGING_CONFIG_PATH; it failed after the weights were loaded."""
    readings = replay((LOGS / "json.txt").read_text().splitlines())
    assert list(dict.fromkeys(reading.phase for reading in readings)) == ["starting", "loading weights"]
    assert (readings[-1].fraction, readings[-1].message) == (1.0, "Loading weights took 0.01 seconds")
