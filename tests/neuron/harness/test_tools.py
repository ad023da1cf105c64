"""`tools = true`: which arguments it becomes."""

from __future__ import annotations

import pytest

from neuron.config import NeuronConfig
from neuron.harness.checks import spec_of
from neuron.harness.vllm.tools import family_of, tool_arguments
from shared.errors import InvalidRequest
from shared.protocol import LoadCommand

AUTO = "--enable-auto-tool-choice"
VLLM = NeuronConfig.model_validate({"harnesses": [{"name": "vllm"}]})
SIM = NeuronConfig.model_validate({"harnesses": [{"name": "sim"}]})


@pytest.mark.parametrize(
    ("name", "tool", "reasoning"),
    [
        ("Qwen/Qwen3.6-27B", "qwen3_coder", "qwen3"),
        ("Qwen/Qwen3-8B", "hermes", "qwen3"),
        ("Qwen/Qwen3-0.6B-FP8", "hermes", "qwen3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "hermes", None),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "hermes", "qwen3"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3_coder", None),
        ("Qwen/Qwen2.5-7B-Instruct", "hermes", None),
        ("/srv/models/qwen3_coder_next/", "qwen3_coder", None),
        ("openai/gpt-oss-120b", "openai", "openai_gptoss"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3_json", None),
        ("NousResearch/Hermes-3-Llama-3.1-8B", "hermes", None),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama4_pythonic", None),
        ("mistralai/Devstral-Small-2507", "mistral", None),
        ("mistralai/Ministral-3-14B-Reasoning-2512", "mistral", "mistral"),
        ("mistralai/Magistral-Small-2509", "mistral", "mistral"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek_v31", "deepseek_v3"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek_v3", None),
        ("zai-org/GLM-4.6-FP8", "glm45", "glm45"),
        ("zai-org/GLM-4.7", "glm47", "glm47"),
        ("moonshotai/Kimi-K2-Thinking", "kimi_k2", "kimi_k2"),
        ("MiniMaxAI/MiniMax-M2", "minimax_m2", "minimax_m2"),
        ("google/gemma-4-27b-it", "gemma4", "gemma4"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8", "qwen3_coder", "nemotron_v3"),
    ],
)
def test_families(name: str, tool: str, reasoning: str | None) -> None:
    """Each model id gets its family's tool parser and reasoning parser."""
    thinking = () if reasoning is None else ("--reasoning-parser", reasoning)
    assert tool_arguments([name], []) == (AUTO, "--tool-call-parser", tool, *thinking)


@pytest.mark.parametrize(
    "name",
    [
        "org/model",
        "Qwen/Qwen3-Embedding-8B",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        "nvidia/Llama-3_1-Nemotron-Ultra-253B-v1",
        "qwen3/model",  # only the last part counts
    ],
)
def test_models_of_no_known_family_are_refused_with_what_to_do(name: str) -> None:
    """The error says which arguments to set by hand."""
    with pytest.raises(InvalidRequest, match=r"no tool-call parser known.*put --enable-auto-tool-choice") as caught:
        tool_arguments([name], [])
    assert (caught.value.param, caught.value.status) == ("tools", 400)


def test_a_path_that_says_nothing_leaves_it_to_the_id() -> None:
    """The family comes from the model's id if its path does not name one."""
    assert family_of(["/models/current", "Qwen/Qwen3-8B"]) == family_of(["Qwen/Qwen3-8B"])


@pytest.mark.parametrize(
    ("args", "added"),
    [
        (["--reasoning-parser", "deepseek_r1"], (AUTO, "--tool-call-parser", "hermes")),
        (["--tool-call-parser=pythonic"], (AUTO,)),
        (["--tool_call_parser", "pythonic", "--enable_auto_tool_choice"], ()),
        ([AUTO], ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")),
    ],
)
def test_what_the_arguments_choose_is_kept(args: list[str], added: tuple[str, ...]) -> None:
    """A parser among the model's own arguments wins; only what is missing is added."""
    assert tool_arguments(["Qwen/Qwen3-8B"], args) == added


def test_a_load_command_with_tools_becomes_arguments() -> None:
    """They come first, so that a repeated flag among the model's own arguments wins, and they distinguish engines."""
    command = LoadCommand(model_id="Qwen/Qwen3-8B", args=["--dtype", "half"], tools=True)
    spec = spec_of(command, VLLM)
    assert spec.args == (AUTO, "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--dtype", "half")
    without = spec_of(LoadCommand(model_id="Qwen/Qwen3-8B"), VLLM)
    assert "args is ()" in (without.difference(spec) or "")
    assert spec_of(LoadCommand(model_id="org/model", tools=False), VLLM).args == ()
    with pytest.raises(InvalidRequest, match="tools: no tool-call parser known for 'org/model'"):
        spec_of(LoadCommand(model_id="org/model", tools=True), VLLM)
    own = {"harnesses": [{"name": "vllm"}], "harness": {"vllm": {"extra_args": ["--tool-call-parser", "xlam"]}}}
    operators = spec_of(LoadCommand(model_id="org/model", tools=True), NeuronConfig.model_validate(own))
    assert operators.args == (AUTO,)


def test_a_simulated_engine_needs_no_parser() -> None:
    """The simulation calls tools for any model; a known family still gets its parser."""
    assert spec_of(LoadCommand(model_id="org/model", tools=True), SIM).args == ()
    spec = spec_of(LoadCommand(model_id="Qwen/Qwen3-8B", tools=True), SIM)
    assert "--tool-call-parser" in spec.args
