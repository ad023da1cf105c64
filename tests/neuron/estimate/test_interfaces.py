"""`GET /estimate` and `neuron estimate`, from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from blockbuster import blockbuster_ctx

from shared.protocol import EstimateReply
from tests.neuron.estimate.published import LLAMA_8B
from tests.neuron.estimate.safetensors import llama_tensors, write_model
from tests.neuron.neurons import REPOSITORY, Answer, Neuron, config_of, neuron_here


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint of the size of Llama 3.1 8B, in sparse files."""
    return write_model(tmp_path / "roots" / "llama", LLAMA_8B.config, llama_tensors(LLAMA_8B.config))


@pytest.fixture
async def rooted(mark: str, tmp_path: Path) -> AsyncIterator[Neuron]:
    """A neuron with two 32 GiB cards, model roots, a separate hub cache for engines, and extra arguments."""
    settings = {"env": {"HF_HUB_CACHE": str(tmp_path / "hub")}, "extra_args": ["--kv-cache-dtype", "fp8"]}
    (tmp_path / "roots").mkdir(exist_ok=True)
    config = config_of(
        tmp_path / "state",
        model_roots=[tmp_path / "roots"],
        harnesses=[{"name": "vllm"}, {"name": "sim"}],
        harness={"vllm": settings, "sim": settings},
    )
    with blockbuster_ctx(["neuron", "shared"]):
        async with neuron_here(config) as served:
            yield served


async def ask(neuron: Neuron, **parameters: object) -> Answer:
    return await neuron.call("GET", f"/estimate?{urlencode(parameters)}")


async def test_estimate_of_a_directory(neuron: Neuron, llama: Path) -> None:
    """Line by line: 16 GB of weights, the whole context, the overhead; a 32 GiB card is too small."""
    answer = await ask(neuron, model=llama)
    assert answer.status == 200, answer.body
    made = EstimateReply.model_validate(answer.body)
    assert (made.architecture, made.max_model_len, made.sequences) == ("LlamaForCausalLM", 131_072, 1)
    assert made.basis == "sizes in 1 safetensors file, 16 bits a number once loaded"
    weights = sum(line.total_mb or 0 for line in made.lines if line.what.startswith("weights"))
    assert weights == pytest.approx(16_061e6 / (1 << 20), rel=0.001)
    assert sum(line.total_mb or 0 for line in made.lines) == made.total_mb
    assert (made.tensor_parallel, made.split_over, made.host_devices) == (2, 2, 2)
    assert [option.tensor_parallel for option in made.options if option.fits] == [2]


async def test_parameters_change_the_sum(neuron: Neuron, llama: Path) -> None:
    """Each parameter takes effect."""
    short = (await ask(neuron, model=llama, max_model_len="8K")).body
    assert (short["max_model_len"], short["tensor_parallel"]) == (8192, 1)
    many = (await ask(neuron, model=llama, max_model_len="8K", max_num_seqs=8)).body
    assert many["sequences"] == 8
    split = (await ask(neuron, model=llama, max_model_len="8K", tensor_parallel=4)).body
    assert (split["split_over"], split["tensor_parallel"]) == (4, 1)
    small = (await ask(neuron, model=llama, max_model_len="8K", quant="fp8", kv_cache_dtype="fp8")).body
    assert short["total_mb"] - small["total_mb"] == pytest.approx(6656 + 512, abs=5)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({}, "model"),
        ({"model": ""}, "model"),
        ({"model": "-x"}, "model"),
        ({"model": "a;b"}, "model"),
        ({"model": "../../etc"}, "model"),
        ({"model": "x" * 600}, "model"),
        ({"model": "m", "max_model_len": "long"}, "max_model_len"),
        ({"model": "m", "max_num_seqs": "0"}, "max_num_seqs"),
        ({"model": "m", "max_num_seqs": "1k"}, "max_num_seqs"),
        ({"model": "m", "tensor_parallel": "65"}, "tensor_parallel"),
        ({"model": "m", "tensor_parallel": "٢"}, "tensor_parallel"),
        ({"model": "m", "quant": "a b"}, "quant"),
        ({"model": "m", "kv_cache_dtype": "int99"}, "kv_cache_dtype"),
        ({"model": "m", "vram": "7"}, "vram"),
    ],
)
async def test_wrong_parameters(neuron: Neuron, parameters: Mapping[str, str], param: str) -> None:
    """The error is 400 with the parameter's name, also for unknown parameters."""
    answer = await ask(neuron, **parameters)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_request", param)
    assert len(answer.error["message"]) < 1000


async def test_a_repeated_parameter(neuron: Neuron) -> None:
    """A parameter given twice is a 400 instead of a silent choice."""
    answer = await neuron.call("GET", "/estimate?model=a&model=b")
    assert (answer.status, answer.error["message"]) == (400, "model: given more than once")


async def test_a_missing_model(neuron: Neuron) -> None:
    """The error is 404 with its own code: a neuron without this route answers 404 too."""
    answer = await ask(neuron, model="org/missing")
    assert (answer.status, answer.error["code"]) == (404, "model_files_not_found")


async def test_a_broken_model(neuron: Neuron, tmp_path: Path) -> None:
    """The error is 422 with the file's name."""
    (tmp_path / "config.json").write_text("{")
    answer = await ask(neuron, model=tmp_path)
    assert (answer.status, answer.error["code"]) == (422, "model_files_invalid")
    assert str(tmp_path / "config.json") in answer.error["message"]


async def test_model_roots_limit_what_is_read(rooted: Neuron, llama: Path, tmp_path: Path) -> None:
    """A path outside is refused, whether it exists or not, and so is a link that leads out."""
    assert (await ask(rooted, model=llama)).status == 200
    outside = write_model(tmp_path / "outside", LLAMA_8B.config)
    (tmp_path / "roots" / "link").symlink_to(outside)
    for path in (outside, tmp_path / "roots" / "link", "/nothing/here"):
        answer = await ask(rooted, model=path)
        assert (answer.status, answer.error["param"]) == (400, "model"), path
        assert "outside of model_roots" in answer.error["message"]


async def test_engines_environment_and_arguments_count(rooted: Neuron, tmp_path: Path) -> None:
    """`[harness.vllm] env` sets the hub's cache; `extra_args` are part of every command line."""
    repository = tmp_path / "hub" / "models--meta-llama--Llama"
    write_model(repository / "snapshots" / "abc", LLAMA_8B.config)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    answer = await ask(rooted, model="meta-llama/Llama", max_model_len="16K")
    assert answer.status == 200, answer.body
    cache = next(line for line in answer.body["lines"] if line["what"].startswith("KV cache"))
    assert (cache["total_mb"], cache["how"].endswith("fp8")) == (1024, True)


async def test_a_known_model_is_estimated_as_it_was_loaded(neuron: Neuron, llama: Path) -> None:
    """The id alone is enough: source, arguments and devices are those of the remembered load."""
    loaded = await neuron.load("test/llama", "--max-model-len", "4096", source=str(llama), tensor_parallel=2)
    assert loaded.status == 200, loaded.body
    body = (await ask(neuron, model="test/llama")).body
    assert (body["model"], body["source"], body["max_model_len"]) == ("test/llama", str(llama), 4096)
    assert (body["split_over"], body["tensor_parallel"]) == (2, 1)
    assert (await ask(neuron, model="test/llama", tensor_parallel=1)).body["split_over"] == 1


def run(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
    return subprocess.run(
        [sys.executable, "-m", "neuron", "estimate", *arguments],
        cwd=cwd,
        env={**variables, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def two_cards(tmp_path: Path) -> str:
    path = tmp_path / "neuron.toml"
    path.write_text('[simulate]\ndevices = ["RTX 4090", "RTX 4090"]\n')
    return str(path)


def test_command_prints_a_table(llama: Path, two_cards: str) -> None:
    """A relative path works; every line has its size and an explanation."""
    result = run("llama", "--max-model-len", "32K", "--config", two_cards, cwd=llama.parent)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "model    llama  (LlamaForCausalLM)"
    assert lines[1] == "weights  sizes in 1 safetensors file, 16 bits a number once loaded"
    assert lines[2] == "context  1 sequence of 32,768 tokens at once, on 1 device"
    assert any(line.startswith("KV cache: full attention") and " 4,096  1 x 32,768 tokens" in line for line in lines)
    assert any(line.startswith("total") for line in lines)
    assert " 3 devices             impossible  32 attention heads cannot be divided by 3" in lines
    assert lines[-1] == "The smallest tensor-parallel size that fits here: 1"


def test_command_for_scripts(llama: Path, two_cards: str) -> None:
    """`--json` prints the same answer as the HTTP API."""
    options = ("--tensor-parallel", "2", "--max-num-seqs", "2", "--quant", "fp8", "--kv-cache-dtype", "fp8")
    result = run(str(llama), *options, "--json", "--config", two_cards)
    assert result.returncode == 0, result.stderr
    body: dict[str, Any] = json.loads(result.stdout)
    assert (body["split_over"], body["sequences"], body["host_devices"]) == (2, 2, 2)
    assert body["total_mb"] == sum(line["total_mb"] for line in body["lines"])


def test_command_reports_errors(llama: Path, two_cards: str, tmp_path: Path) -> None:
    """The command exits with 1 and prints one line, no traceback."""
    broken = write_model(tmp_path / "broken", {"hidden_size": 8})
    for arguments, said in (
        (("org/missing",), "neuron: the files of 'org/missing' are not on this host"),
        ((str(broken),), f"neuron: {broken / 'config.json'} has no num_hidden_layers"),
        (
            (str(llama), "--max-model-len", "long"),
            "neuron: max_model_len: must be a number such as 32768, 32k or 32K, got 'long'",
        ),
        ((str(llama), "--tensor-parallel", "0"), "neuron: tensor_parallel: must be a number from 1 to 64, got '0'"),
    ):
        result = run(*arguments, "--config", two_cards, HF_HOME=str(tmp_path))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(said)
        assert result.stderr.count("\n") == 1


def test_the_hubs_library_is_imported_only_when_needed() -> None:
    """It takes longer to import than everything else."""
    code = "import sys, neuron.__main__; print([name for name in sys.modules if name.startswith('huggingface')])"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
