"""From flags to lines: options, sizes and unknowns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neuron.estimate.estimator import estimate_of
from neuron.estimate.options import EngineOptions, human_number, length_of, with_options
from neuron.estimate.reply import reply_of, table_of
from neuron.estimate.result import Estimate
from neuron.estimate.weights import ModelFiles
from neuron.gpu.topology import Topology
from neuron.harness.vllm.estimate.estimator import VllmEstimator, estimate
from neuron.harness.vllm.estimate.overhead import batching_of
from neuron.harness.vllm.memory_flags import options_of
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.protocol import Device
from tests.neuron.estimate import published
from tests.neuron.estimate.published import LLAMA_8B, QWEN3_30B_A3B, Published
from tests.neuron.estimate.safetensors import write_model

RTX_4090 = Device(index=0, name="RTX 4090", vram_total_mb=24_564)
H100 = Device(index=0, name="NVIDIA H100 80GB HBM3", vram_total_mb=81_559)


def options(*args: str, quant: str | None = None) -> EngineOptions:
    return options_of(EngineSpec("m", "vllm", "m", quant=quant, args=args))


def of(model: Published, *args: str, devices: int = 1, card: Device = RTX_4090, quant: str | None = None) -> Estimate:
    spec = EngineSpec("m", "vllm", "m", quant=quant, args=args, tensor_parallel=devices)
    cards = [card.model_copy(update={"index": index}) for index in range(4)]
    return estimate(ModelFiles(model.name, model.architecture, None), options_of(spec), cards)


def line(made: Estimate, what: str) -> int | None:
    """MiB on each device, of the line that starts with `what`."""
    return next(each.device_mb for each in made.lines if each.what.startswith(what))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("32768", 32768), ("32k", 32_000), ("32K", 32_768), ("1K", 1024), ("1.5k", 1500), ("1m", 10**6), ("1M", 1 << 20)],
)
def test_lengths_in_vllms_notation(text: str, tokens: int) -> None:
    """Lower case for thousands, upper case for 1024s; fractions of thousands only."""
    assert length_of(text, "max_model_len") == tokens
    assert options("--max-model-len", text).max_model_len == options(f"--max_model_len={text}").max_model_len == tokens


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "1.5K", "banana", "1e9", "32kk", "٣٢", "9" * 40, "1G 2", "nan"])
def test_invalid_lengths(text: str) -> None:
    """The message names the flag or parameter, and the value."""
    with pytest.raises(InvalidRequest, match="max_model_len: ") as caught:
        human_number(text, "max_model_len", "max_model_len")
    assert caught.value.param == "max_model_len"
    with pytest.raises(InvalidRequest) as of_argument:
        options(f"--max-model-len={text}")
    assert of_argument.value.param == "args"
    assert of_argument.value.message.startswith("--max-model-len: ")


def test_automatic_length_is_the_models_own() -> None:
    assert options("--max-model-len", "auto").max_model_len is options("--max-model-len=-1").max_model_len is None
    assert of(LLAMA_8B, "--max-model-len", "auto").max_model_len == 131_072


def test_every_flag_in_every_spelling() -> None:
    """Two words or one, underscores for dashes, the short form; the last of two counts."""
    asked = options(
        *("--max-num-seqs", "8", "--max_num_batched_tokens=4k", "--kv-cache-dtype", "fp8", "--dtype=half"),
        *("--kv-cache-memory-bytes", "2G", "-q", "fp8", "--cpu-offload-gb=1.5", "--enforce-eager"),
        *("--gpu-memory-utilization", "0.5", "--device-memory-utilization=.8", "--runner", "pooling"),
        *(
            "--revision=v2",
            "--download-dir",
            "/data",
            "--max-num-seqs",
            "16",
            "--port-of-nothing",
            "--max-model-len=1k",
        ),
    )
    assert asked == EngineOptions(
        max_model_len=1000,
        max_num_seqs=16,
        max_num_batched_tokens=4000,
        kv_cache_dtype="fp8",
        kv_cache_bytes=2 << 30,
        dtype="half",
        quantization="fp8",
        memory_fraction=0.8,
        cpu_offload_gib=1.5,
        eager=True,
        pooling=True,
        revision="v2",
        download_dir="/data",
        tensor_parallel=1,
    )
    assert options("--enforce-eager", "--no-enforce-eager").eager is False
    assert options(quant="awq").quantization == "awq"


@pytest.mark.parametrize(
    "args",
    [
        ("--max-num-seqs", "many"),
        ("--max-num-seqs",),
        ("--max-num-batched-tokens=0",),
        ("--kv-cache-memory-bytes", "1.5G"),
        ("--cpu-offload-gb", "-1"),
        ("--gpu-memory-utilization", "half"),
        ("--gpu-memory-utilization=",),
    ],
)
def test_arguments_that_must_be_numbers(args: tuple[str, ...]) -> None:
    """vLLM refuses them too, but only after its start."""
    with pytest.raises(InvalidRequest) as caught:
        options(*args)
    assert caught.value.param == "args"
    assert caught.value.message.startswith(args[0].partition("=")[0])


@pytest.mark.parametrize(
    ("mb", "name", "length", "args", "expected"),
    [
        (24_564, "RTX 4090", 32_768, (), (256, 2048)),
        (81_559, "NVIDIA H100 80GB HBM3", 32_768, (), (1024, 8192)),
        (81_920, "NVIDIA A100-SXM4-80GB", 32_768, (), (256, 2048)),
        (183_359, "NVIDIA B200", 32_768, (), (1024, 16_384)),
        (24_564, "RTX 4090", 32_768, ("--max-num-seqs", "4"), (4, 2048)),
        (24_564, "RTX 4090", 100, ("--max-num-seqs", "4"), (4, 400)),
        (24_564, "RTX 4090", 32_768, ("--max-num-batched-tokens", "64"), (64, 64)),
    ],
)
def test_batches_match_vllm(mb: int, name: str, length: int, args: tuple[str, ...], expected: tuple[int, int]) -> None:
    """The estimate has vLLM's defaults for an API server, by the device's memory."""
    batching = batching_of(options(*args), max_model_len=length, device_mb=mb, device_name=name)
    assert (batching.sequences, batching.tokens) == expected


def test_lines_come_to_the_total() -> None:
    """Each line counts once, in the total and per device."""
    made = of(LLAMA_8B, "--max-model-len", "32K", devices=2)
    assert made.split_over == 2
    assert sum(each.total_mb or 0 for each in made.lines) == made.total_mb
    assert sum(each.device_mb or 0 for each in made.lines) == made.per_device_mb(2)
    assert 0 <= 2 * made.per_device_mb(2) - made.total_mb <= 2 * len(made.lines)
    assert line(made, "KV cache") == 2048
    assert line(made, "weights: attention") == 1280
    assert line(made, "communication") == 1024
    assert not any(each.what == "communication" for each in of(LLAMA_8B).lines)


def test_flags_change_their_lines() -> None:
    """A flag changes only the line that it is about."""
    plain = of(LLAMA_8B, "--max-model-len", "8192")
    assert line(of(LLAMA_8B, "--max-model-len", "8192", "--kv-cache-dtype", "fp8"), "KV cache") == 512
    assert line(of(LLAMA_8B, "--max-model-len", "8192", "--kv-cache-memory-bytes", "3G"), "KV cache") == 3072
    assert line(of(LLAMA_8B, "--max-model-len", "8192", "--enforce-eager"), "CUDA graphs") == 0
    assert line(of(LLAMA_8B, "--max-model-len", "8192", "--cpu-offload-gb", "4"), "weights: in host") == -4096
    assert line(of(LLAMA_8B, "--dtype", "float32"), "weights: attention") == 2 * (line(plain, "weights: att") or 0)
    assert line(of(LLAMA_8B, quant="fp8"), "weights: attention") == (line(plain, "weights: att") or 0) / 2
    few = of(LLAMA_8B, "--max-model-len", "8192", "--max-num-seqs", "8", "--max-num-batched-tokens", "512")
    assert (line(few, "activations") or 0) < (line(plain, "activations") or 0) / 3


def test_one_whole_sequence_fits_by_default() -> None:
    """`--max-num-seqs` of an engine is a limit; it does not mean that as many have the full length."""
    assert of(LLAMA_8B, "--max-num-seqs", "256").sequences == 1
    cards = [RTX_4090]
    made = estimate(
        ModelFiles("m", LLAMA_8B.architecture, None), EngineOptions(max_model_len=8192, full_sequences=4), cards
    )
    assert (made.sequences, line(made, "KV cache")) == (4, 4096)


def test_encoders_have_no_kv_cache() -> None:
    """Encoders have no sampler either. vLLM allocates no cache for them, whatever size is configured."""
    made = of(published.MINILM, "--kv-cache-memory-bytes", "64M")
    assert line(made, "KV cache") == line(made, "CUDA graphs") == 0
    assert next(each.how for each in made.lines if each.what == "KV cache") == "none: encoders have no KV cache"
    assert (line(made, "activations") or 0) < 20


def test_unknowns_are_listed() -> None:
    """Each has a line without a number and is not in the total."""
    made = of(published.GEMMA3_27B, "--speculative-config", "{}", "--kv-cache-dtype", "new_type")
    assert {"weights", "KV cache", "activations of images or audio", "--speculative-config"} <= set(made.unknown)
    assert all(each.total_mb is None for each in made.lines if each.how.startswith("not counted"))
    mamba = Published("hybrid", {**LLAMA_8B.config, "hybrid_override_pattern": "M-*" * 11}, 0, 0)
    assert "state of 11 state-space layers (Mamba or alike)" in of(mamba).unknown
    assert any("weights" in each.what and "11 layers without attention" in each.how for each in of(mamba).lines)
    assert "more than the model's 131072" in of(LLAMA_8B, "--max-model-len", "200k").notes[0]


def test_options_have_reasons() -> None:
    """Each number of devices has one: fits, too little memory, too few devices, cannot be split."""
    made = of(LLAMA_8B, "--max-model-len", "131072")
    reasons = {option.tensor_parallel: option.reason or "fits" for option in made.options}
    assert reasons[1] == "more than the usable 22598 MiB of 24564"
    assert reasons[2] == reasons[4] == "fits"
    assert reasons[3] == "32 attention heads cannot be divided by 3"
    assert reasons[8] == "this host has 4 usable devices"
    assert (made.tensor_parallel, made.split_over) == (2, 1)
    assert made.reasons[0].startswith(f"over 1, {made.per_device_mb(1)} MiB on each: more than")
    with pytest.raises(ValueError, match="9 devices: estimated for 1 to 8"):
        made.per_device_mb(9)


def test_the_default_is_the_smallest_number_of_devices_that_fits() -> None:
    model = ModelFiles("m", LLAMA_8B.architecture, None)
    two = [RTX_4090, RTX_4090.model_copy(update={"index": 1})]
    made = estimate(model, EngineOptions(), two)
    assert (made.tensor_parallel, made.split_over) == (2, 2)
    lost = [RTX_4090, RTX_4090.model_copy(update={"index": 1, "lost": "fell off the bus"})]
    found = estimate(model, EngineOptions(), lost)
    assert (found.tensor_parallel, found.host_devices) == (None, 1)
    assert estimate(model, EngineOptions(), []).host_devices == 0
    assert estimate(model, EngineOptions(memory_fraction=0.1), two).tensor_parallel is None


async def test_only_the_specs_devices_count(tmp_path: Path) -> None:
    """The large card does not help an engine that runs on the small one."""
    write_model(tmp_path, LLAMA_8B.config)
    small = Device(index=1, vram_total_mb=12_288)
    topology = Topology(devices=(H100, small))
    spec = EngineSpec("m", "vllm", str(tmp_path), args=("--max-model-len", "1k"))
    assert (await estimate_of(VllmEstimator(), spec, topology, {})).tensor_parallel == 1
    named = EngineSpec("m", "vllm", str(tmp_path), args=("--max-model-len", "1k"), devices=(1,))
    assert (await estimate_of(VllmEstimator(), named, topology, {})).tensor_parallel is None


def split_over(model: Published, **split: Any) -> Estimate:
    spec = EngineSpec("m", "vllm", "m", **split)
    cards = [H100.model_copy(update={"index": index}) for index in range(8)]
    return estimate(ModelFiles(model.name, model.architecture, None), options_of(spec), cards)


@pytest.mark.parametrize(
    ("split", "experts", "attention", "cache"),
    [
        ({"tensor_parallel": 2}, 2, 2, 2),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, 4, 4, 4),
        ({"tensor_parallel": 2, "data_parallel": 2}, 4, 2, 2),  # the experts are split over both copies
        ({"tensor_parallel": 2, "data_parallel": 2, "expert_parallel": True}, 4, 2, 2),
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2}, 8, 4, 4),
    ],
)
def test_parallel_weights_and_cache(split: dict[str, Any], experts: int, attention: int, cache: int) -> None:
    """Layers are split over the tensor group and the stages, and repeated for each copy; each copy has a cache."""
    one, made = split_over(QWEN3_30B_A3B, tensor_parallel=1), split_over(QWEN3_30B_A3B, **split)
    devices = EngineSpec("m", "vllm", "m", **split).device_count
    for what, parts in (("weights: experts", experts), ("weights: attention", attention), ("KV cache", cache)):
        whole, part = line(one, what), line(made, what)
        assert whole is not None
        assert part is not None
        assert abs(part * parts - whole) <= parts, what
    assert made.split_over == devices
    assert made.total_mb == pytest.approx(made.per_device_mb(2) * devices, abs=devices * len(made.lines))
    reply = reply_of("m", made)
    assert (reply.parallel is None) == (devices == 2)
    assert f"on {devices} devices" in table_of(reply)


def test_uneven_stages_count_the_largest() -> None:
    """Of 32 layers in 3 stages the largest has 11; embeddings and output head are on two stages."""
    one, made = split_over(LLAMA_8B, tensor_parallel=1), split_over(LLAMA_8B, pipeline_parallel=3)
    assert line(made, "weights: feed-forward") == pytest.approx(
        (line(one, "weights: feed-forward") or 0) * 11 / 32, 0.01
    )
    assert line(made, "weights: embeddings") == pytest.approx((line(one, "weights: embeddings") or 0) / 2, abs=1)


@pytest.mark.parametrize(
    ("model", "split", "reason"),
    [
        (LLAMA_8B, {"expert_parallel": True}, "expert parallelism needs a mixture of experts"),
        (LLAMA_8B, {"pipeline_parallel": 33}, "32 layers are too few for 33 pipeline stages"),
        (LLAMA_8B, {"pipeline_parallel": 2, "data_parallel": 8}, "this host has 8 usable devices"),
        (QWEN3_30B_A3B, {"data_parallel": 5}, "the expert's width 768 cannot be divided by 5"),
        (QWEN3_30B_A3B, {"data_parallel": 5, "expert_parallel": True}, None),
        (LLAMA_8B, {"data_parallel": 8}, None),
    ],
)
def test_what_cannot_be_split(model: Published, split: dict[str, Any], reason: str | None) -> None:
    """The reason is in the option with one device in a tensor group."""
    assert split_over(model, **split).options[0].reason == reason


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"pipeline_parallel": "0"}, "pipeline_parallel"),
        ({"tensor_parallel": "8", "data_parallel": "9"}, "tensor_parallel"),
    ],
)
def test_invalid_sizes(given: dict[str, str], param: str) -> None:
    """The error names the option; the product is limited too."""
    with pytest.raises(InvalidRequest) as caught:
        with_options(EngineOptions(), given)
    assert caught.value.param == param
