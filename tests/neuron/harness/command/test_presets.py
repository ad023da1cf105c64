"""The presets: the command lines that they make, and what they read in lines that the engines are known to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from neuron.harness.base import EngineCommand
from neuron.harness.checks import CheckedHarness
from neuron.harness.command.harness import CommandHarness
from neuron.harness.command.preset_files import preset_names
from neuron.spec import EngineSpec
from shared.protocol import FailureCause
from tests.neuron.harness.command.test_placeholders import FACTS, GPUS, planned

HUB = EngineSpec("org/m", "x", "org/m-GGUF:Q4_K_M", args=("--own",))
FILE = replace(HUB, source="/srv/m.gguf")


def table_of(preset: str) -> CheckedHarness:
    return CheckedHarness.model_validate({"preset": preset})


def started(preset: str, spec: EngineSpec, *, key: str | None = "secret", share_mb: int | None = None) -> EngineCommand:
    """On one GPU of 24000 MiB."""
    plan = planned(table_of(preset), spec, api_key=key, share_mb=share_mb, devices=GPUS[:1])
    return CommandHarness(plan.settings).command(plan, FACTS)


WHERE = ("--host", "127.0.0.1", "--port", "20001")


@pytest.mark.parametrize(
    ("preset", "spec", "argv"),
    [
        (
            "llama.cpp",
            FILE,
            ("llama-server", "--model", "/srv/m.gguf", "--alias", "org/m", *WHERE, "--metrics", "--own"),
        ),
        (
            *("llama.cpp", HUB),
            ("llama-server", "--hf-repo", "org/m-GGUF:Q4_K_M", "--alias", "org/m", *WHERE, "--metrics", "--own"),
        ),
        (
            *("llama-cpp-python", FILE),
            (
                *("python3", "-m", "llama_cpp.server", "--model", "/srv/m.gguf", "--model_alias", "org/m", *WHERE),
                *("--n_gpu_layers", "-1", "--n_ctx", "0", "--interrupt_requests", "False", "--own"),
            ),
        ),
        (
            *("sglang", replace(HUB, source="org/m", quant="fp8", tensor_parallel=2)),
            (
                *("python3", "-m", "sglang.launch_server", "--model-path", "org/m", "--served-model-name", "org/m"),
                *(*WHERE, "--tp-size", "2", "--pp-size", "1", "--dp-size", "1", "--quantization", "fp8"),
                *("--api-key", "secret", "--enable-metrics", "--own"),
            ),
        ),
        (
            *("infinity", replace(HUB, source="org/m")),
            (
                *("infinity_emb", "v2", "--model-id", "org/m", "--served-model-name", "org/m", *WHERE),
                *("--url-prefix", "/v1", "--own"),
            ),
        ),
        (
            "speaches",
            replace(HUB, source="org/m"),
            ("uvicorn", "--factory", "speaches.main:create_app", *WHERE, "--own"),
        ),
    ],
)
def test_command_lines(preset: str, spec: EngineSpec, argv: Sequence[str]) -> None:
    """As the engines' documentation has them."""
    assert started(preset, spec).argv == argv


@pytest.mark.parametrize(
    ("preset", "variable"),
    [
        ("llama.cpp", "LLAMA_API_KEY"),
        ("llama-cpp-python", "API_KEY"),
        ("infinity", "INFINITY_API_KEY"),
        ("speaches", "API_KEY"),
    ],
)
def test_keys_are_in_the_environment(preset: str, variable: str) -> None:
    """Not on the command line, which every user of the host can read. Without a key the variable is absent."""
    with_key = started(preset, FILE)
    assert with_key.env[variable] == "secret"
    assert "secret" not in " ".join(with_key.argv)
    assert variable not in started(preset, FILE, key=None).env


def test_sglang_is_told_its_share() -> None:
    assert "--mem-fraction-static 0.5000" in " ".join(started("sglang", FILE, share_mb=12000).argv)


@pytest.mark.parametrize("preset", preset_names())
def test_what_neuron_sets_is_reserved(preset: str) -> None:
    """Each flag that a preset puts before a placeholder is refused in a load's arguments."""
    table = table_of(preset)
    harness = CommandHarness(table)
    words = [*(table.command or ()), *table.arguments]
    tunable = {"--ctx-size", "--n_ctx", "--quantization", "--context-length", "--mem-fraction-static"}
    for flag, value in pairwise(words):
        if flag.startswith("-") and "{" in value and flag not in tunable:
            assert harness.refused_argument([flag, "x"]) is not None, flag
    assert harness.refused_argument(["--temperature", "1"]) is None


@pytest.mark.parametrize("preset", preset_names())
def test_a_context_in_the_arguments_is_known(preset: str) -> None:
    """A load with `max_model_len` and with the preset's own flag for it is refused."""
    settings = table_of(preset)
    words = pairwise(settings.arguments)
    assert {flag for flag, value in words if value == "{context}"} <= set(settings.context_arguments)


SGLANG_START = (
    "[2025-03-27 21:33:20] server_args=ServerArgs(model_path='meta-llama/Llama-3.1-8B-Instruct', port=30000)",
    "[2025-10-16 09:06:10 TP0] Load weight begin. avail mem=137.34 GB",
    "Loading safetensors checkpoint shards:  50% Completed | 15/30 [00:10<00:10,  1.5it/s]",
    "[2025-03-27 21:33:30 TP0] Load weight end. type=Gemma3ForConditionalGeneration, avail mem=131.08 GB",
    "[2025-03-27 21:33:31 TP0] Capture cuda graph begin. This can take up to several minutes. avail mem=13.95 GB",
    "Capturing batches (bs=1 avail_mem=11.18 GB):  75%|███████▌  | 27/36 [00:07<00:02,  3.37it/s]",
    "INFO:     Application startup complete.",
)
LLAMA_START = (
    "0.00.000.100 I cmn  common_param: common_params_print_info: verbosity = 3",
    "0.00.053.775 I srv    load_model: loading model '/srv/m.gguf'",
    "0.00.428.280 I srv  llama_server: model loaded",
    "0.00.428.301 I srv  llama_server: listening on http://127.0.0.1:18444",
)


@pytest.mark.parametrize(
    ("preset", "lines", "phases"),
    [
        (
            *("sglang", SGLANG_START),
            [
                ("starting", None),
                ("loading weights", None),
                ("loading weights", 0.5),
                ("loading weights", 0.5),
                ("capturing graphs", None),
                ("capturing graphs", 0.75),
                ("warming up", None),
            ],
        ),
        (
            *("llama.cpp", LLAMA_START),
            [("starting", None), ("loading weights", None), ("warming up", None), ("warming up", None)],
        ),
    ],
)
def test_progress(preset: str, lines: Sequence[str], phases: list[tuple[str, float | None]]) -> None:
    """The phase and its share after each line."""
    reading, seen = CommandHarness(table_of(preset)).first_reading(), []
    for line in lines:
        reading = reading.after(line)
        seen.append((reading.phase, reading.fraction))
    assert seen == phases


LLAMA = "llama.cpp"
NODE, THE_MODEL, UNKNOWN = FailureCause.NODE, FailureCause.MODEL, FailureCause.UNKNOWN


@pytest.mark.parametrize(
    ("preset", "line", "cause", "permanent"),
    [
        (LLAMA, "alloc_buffer: allocating 81656.95 MiB on device 0: cudaMalloc failed: out of "
         "memory", NODE, True),
        (LLAMA, "0.01.322.919 E llama_model_load: error loading model: unable to allocate CUDA0 buffer", NODE, True),
        (LLAMA, "0.00.008.416 E gguf_init_from_reader: failed to read magic", THE_MODEL, True),
        (LLAMA, "llama_model_load: error loading model: unknown model architecture: 'x'", THE_MODEL, True),
        (LLAMA, "error: invalid argument: --foo", THE_MODEL, True),
        (LLAMA, 'error while handling argument "--ctx-size": stoi', THE_MODEL, True),
        (LLAMA, "E gguf_init_from_file: failed to open GGUF file '/x.gguf' (No such file or directory)", NODE, True),
        (LLAMA, "srv  llama_server: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 1", NODE, False),
        ("llama-cpp-python", "ValueError: Model path does not exist: /x.gguf", NODE, True),
        ("sglang", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", NODE, True),
        ("sglang", "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", NODE, True),
        ("sglang", "launch_server.py: error: unrecognized arguments: --foo", THE_MODEL, True),
        ("infinity", "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.", THE_MODEL, True),
        ("speaches", "ERROR:    Error loading ASGI app. Could not import module \"speaches.main\".", NODE, True),
    ],
)  # fmt: skip
def test_causes(preset: str, line: str, cause: FailureCause, permanent: bool) -> None:
    """Found among other lines, and blamed on the host or on the model."""
    harness = CommandHarness(table_of(preset))
    found = harness.root_cause(["starting", line, "exiting due to model loading error", "bye"])
    assert found == line
    assert harness.cause_of(found, path_missing=False) is cause
    assert harness.is_permanent(found, path_missing=False) is permanent


def test_a_missing_file_is_the_hosts_fault() -> None:
    """Another host may have it."""
    harness = CommandHarness(table_of(LLAMA))
    assert harness.cause_of("anything", path_missing=True) is NODE
    assert harness.cause_of("anything", path_missing=False) is UNKNOWN


def test_llama_cpp_tells_its_requests() -> None:
    """From the page of a real llama-server."""
    probe = CommandHarness(table_of(LLAMA)).activity
    assert probe is not None
    page = (
        "# TYPE llamacpp:n_decode_total counter\nllamacpp:n_decode_total 9\nllamacpp:prompt_tokens_total 27\n"
        "llamacpp:tokens_predicted_total 8\nllamacpp:requests_processing 2\nllamacpp:requests_deferred 1\n"
    )
    sample = probe.sample_of(page)
    assert sample is not None
    assert (sample.running, sample.waiting, sample.marks) == (2, 1, (0.0, 9.0, 8.0, 27.0))
    assert probe.sample_of("nothing") is None


@pytest.mark.parametrize(
    "command", ["/opt/venv/bin/python -m llama_cpp.server", ["/opt/venv/bin/python", "-m", "llama_cpp.server"]]
)
def test_the_program_chooses_between_the_presets_of_llama_cpp(command: object) -> None:
    """People who name llama.cpp may mean its Python server, whose flags are others."""
    python = CheckedHarness.model_validate({"preset": "llama-cpp-python", "command": command})
    named = CheckedHarness.model_validate({"preset": "llama.cpp", "command": command})
    assert named.model_dump(exclude={"preset"}) == python.model_dump(exclude={"preset"})
    assert named.command == ["/opt/venv/bin/python", "-m", "llama_cpp.server"]
