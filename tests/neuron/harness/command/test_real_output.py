"""The presets read what real engines of these versions print."""

from __future__ import annotations

import pytest

from neuron.config import HarnessSettings
from neuron.harness.command.harness import CommandHarness
from neuron.harness.command.preset_files import on_preset
from shared.protocol import FailureCause

LLAMA_CPP = (
    "0.00.028.315 I cmn  common_param: common_params_print_info: verbosity = 3 (adjust with the `-lv N` CLI arg)",
    "0.00.053.775 I srv    load_model: loading model '/srv/tiny.gguf'",
    "0.00.073.787 I cmn          init: llama threadpool init, n_threads = 2",
    "0.00.428.280 I srv  llama_server: model loaded",
    "0.00.428.301 I srv  llama_server: listening on http://127.0.0.1:18444",
)
"""Build 10434."""
INFINITY = (
    "INFO:     Waiting for application startup.",
    "INFO     2026-11-29 19:29:22,209 infinity_emb INFO: Creating 1 engines: ['x']       infinity_server.py:84",
    "INFO     2026-11-29 19:29:22,225 infinity_emb INFO: model=`/srv/minilm` selected, using engine=`torch` and "
    "device=`cpu`           select_model.py:66",
    "INFO     2026-11-29 19:29:26,284 infinity_emb INFO: Getting timings for batch_size=32 and avg tokens",
    "INFO:     Application startup complete.",
)
"""0.0.78 with 250 columns."""


def harness(preset: str) -> CommandHarness:
    return CommandHarness(HarnessSettings.model_validate(on_preset({"preset": preset})))


@pytest.mark.parametrize(
    ("preset", "lines", "phases"),
    [
        ("llama.cpp", LLAMA_CPP, ["starting", "loading weights", "loading weights", "warming up", "warming up"]),
        ("infinity", INFINITY, ["starting", "starting", "loading weights", "warming up", "warming up"]),
    ],
)
def test_progress_is_read(preset: str, lines: tuple[str, ...], phases: list[str]) -> None:
    reading, seen = harness(preset).first_reading(), []
    for line in lines:
        reading = reading.after(line)
        seen.append(reading.phase)
    assert seen == phases


@pytest.mark.parametrize(
    ("preset", "lines", "error", "cause"),
    [
        (
            "llama.cpp",
            [
                "0.00.003.972 E gguf_init_from_reader: failed to read key-value pairs",
                "0.00.004.133 E srv    load_model: failed to load model, '/srv/bad.gguf'",
                "0.00.004.444 E srv  llama_server: exiting due to model loading error",
            ],
            "0.00.003.972 E gguf_init_from_reader: failed to read key-value pairs",
            FailureCause.MODEL,
        ),
        (
            "llama.cpp",
            [
                "0.00.004.002 E gguf_init_from_file: failed to open GGUF file '/x.gguf' (No such file or directory)",
                "0.00.004.444 E srv  llama_server: exiting due to model loading error",
            ],
            "0.00.004.002 E gguf_init_from_file: failed to open GGUF file '/x.gguf' (No such file or directory)",
            FailureCause.NODE,
        ),
        (
            "infinity",
            [
                "OSError: Error no file named pytorch_model.bin, model.safetensors found in directory /srv/empty.",
                "",
                "ERROR:    Application startup failed. Exiting.",
            ],
            "OSError: Error no file named pytorch_model.bin, model.safetensors found in directory /srv/empty.",
            FailureCause.MODEL,
        ),
        (
            "infinity",
            ["╭─ Error ─────────────────╮", "│ No such option: --devicex                    │", "╰──────────────────╯"],
            "No such option: --devicex",
            FailureCause.MODEL,
        ),
    ],
)
def test_the_cause_of_a_failure_is_read(preset: str, lines: list[str], error: str, cause: FailureCause) -> None:
    found = harness(preset)
    assert found.root_cause(lines) == error
    assert found.cause_of(error, path_missing=False) is cause
