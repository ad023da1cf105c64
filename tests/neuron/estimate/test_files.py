"""Models in directories and in the hub's cache; broken ones are refused with the file's name."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from neuron.estimate.estimator import estimate_of
from neuron.estimate.files.fields import ModelFilesInvalid
from neuron.estimate.files.parameters import Part, parameter_count
from neuron.estimate.locate import hub_cache, model_at
from neuron.estimate.weights import ModelFiles, weights_of
from neuron.gpu.topology import Topology
from neuron.harness.vllm.estimate.estimator import VllmEstimator
from neuron.lifecycle.admission import is_below
from neuron.spec import EngineSpec
from shared.errors import NotFound, ServiceError
from tests.neuron.estimate.published import DEEPSEEK_V3, GPT_OSS_20B, LLAMA_8B, QWEN2_5_05B, Published
from tests.neuron.estimate.safetensors import llama_tensors, write_header, write_model, write_tensors

SMALL = {
    **LLAMA_8B.config,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


def read(directory: Path) -> ModelFiles:
    return model_at(str(directory), {}, revision=None, download_dir=None)


def loaded_bytes(directory: Path, *, dtype: str = "auto", quantization: str | None = None) -> float:
    model = read(directory)
    weights = weights_of(model.architecture, model.stored, dtype=dtype, quantization=quantization)
    return sum(group.size for group in weights.groups)


@pytest.mark.parametrize("model", [LLAMA_8B, QWEN2_5_05B], ids=lambda model: model.name)
def test_files_and_configuration_agree(model: Published, tmp_path: Path) -> None:
    """The tensors of a checkpoint match the count from its configuration, except for biases."""
    write_model(tmp_path, model.config, llama_tensors(model.config))
    assert loaded_bytes(tmp_path) == pytest.approx(2 * parameter_count(model.architecture), rel=0.001)


def test_shards_are_summed(tmp_path: Path) -> None:
    """Shards in the index count; other files are ignored."""
    tensors = llama_tensors(SMALL)
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    whole = loaded_bytes(write_model(tmp_path / "whole", SMALL, tensors))
    directory = write_model(tmp_path / "shards", SMALL, *halves)
    write_tensors(directory / "other.safetensors", {"a": ("F32", (1000, 1000))})
    assert loaded_bytes(directory) == whole
    stored = read(directory).stored
    assert stored is not None
    assert stored.files == 2


def test_mistrals_second_copy_is_not_counted(tmp_path: Path) -> None:
    """`consolidated.safetensors` has the same weights under other names."""
    directory = write_model(tmp_path, SMALL, llama_tensors(SMALL))
    before = loaded_bytes(directory)
    write_tensors(directory / "consolidated.safetensors", {"tok_embeddings.weight": ("BF16", (1024, 64))})
    assert loaded_bytes(directory) == before


def test_numbers_are_converted_on_loading(tmp_path: Path) -> None:
    """32 bits in the file are 16 when loaded; `--dtype float32` keeps them; fp8 halves the matrices."""
    half = loaded_bytes(write_model(tmp_path / "half", SMALL, llama_tensors(SMALL)))
    directory = write_model(tmp_path / "whole", {**SMALL, "torch_dtype": "float32"}, llama_tensors(SMALL, dtype="F32"))
    assert loaded_bytes(directory) == half
    assert loaded_bytes(directory, dtype="float32") == 2 * half
    plain = 2 * (2 * 1024 * 64 + 5 * 64)  # embeddings, output head, norms
    assert loaded_bytes(directory, quantization="fp8") == plain + (half - plain) / 2


def test_quantized_files_keep_their_size(tmp_path: Path) -> None:
    """Packed integers, 8-bit floats and 32-bit scales: the file's own bytes, with any `--dtype`."""
    config = {**SMALL, "quantization_config": {"quant_method": "compressed-tensors"}}
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (128, 64)),
        "model.layers.0.mlp.up_proj.weight_scale": ("F32", (128, 1)),
        "model.layers.0.mlp.down_proj.weight_packed": ("I32", (64, 16)),
        "model.embed_tokens.weight": ("BF16", (1024, 64)),
    }
    expected = 128 * 64 + 128 * 4 + 64 * 16 * 4 + 1024 * 64 * 2
    assert loaded_bytes(write_model(tmp_path, config, tensors), quantization="fp8") == expected


def test_what_vllm_does_not_load_is_not_counted(tmp_path: Path) -> None:
    """A tied output head and layers for speculative decoding do not count."""
    config = {**SMALL, "tie_word_embeddings": True}
    tensors = llama_tensors(config)
    expected = loaded_bytes(
        write_model(tmp_path / "plain", config, {k: v for k, v in tensors.items() if "lm_" not in k})
    )
    more = {
        "model.layers.2.self_attn.q_proj.weight": ("BF16", (64, 64)),
        "mtp.layers.0.mlp.up_proj.weight": ("BF16", (128, 64)),
    }
    directory = write_model(tmp_path / "more", config, {**tensors, **more})
    assert loaded_bytes(directory) == expected


def test_weights_are_split_as_vllm_splits_them(tmp_path: Path) -> None:
    """Norms are complete on every device, keys and values split by head at most, the rest in equal shares."""
    model = read(write_model(tmp_path, SMALL, llama_tensors(SMALL)))
    weights = weights_of(model.architecture, model.stored, dtype="auto", quantization=None)
    attention = [weights.on_each_device(Part.ATTENTION, devices, 2) for devices in (1, 2, 4)]
    queries, keys = 2 * 2 * 2 * 64 * 64, 2 * 2 * 2 * 64 * 32
    assert attention == [queries + keys, queries / 2 + keys / 2, queries / 4 + keys / 2]
    assert {weights.on_each_device(Part.SMALL, devices, 2) for devices in (1, 2, 4)} == {2 * 5 * 64}


def test_parts_follow_from_tensor_names(tmp_path: Path) -> None:
    """Experts, routers, MLA and image encoders are distinguished."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.layers.0.mlp.experts.7.up_proj.weight": ("BF16", (10, 10)),
        "model.layers.0.mlp.gate.weight": ("BF16", (10, 2)),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ("BF16", (10, 3)),
        "model.layers.0.mlp.shared_experts.gate_proj.weight": ("BF16", (10, 4)),
        "model.visual.blocks.30.attn.qkv.weight": ("BF16", (10, 5)),
    }
    model = read(write_model(tmp_path, SMALL, tensors))
    weights = weights_of(model.architecture, model.stored, dtype="auto", quantization=None)
    split = {part: weights.on_each_device(part, 2, 2) for part in weights.parts()}
    assert split == {
        Part.EXPERTS: 100,
        Part.SMALL: 40,
        Part.ATTENTION: 60,  # the down-projection to the latent is complete on every device
        Part.FEED_FORWARD: 40,
        Part.ENCODERS: 50,
    }


@pytest.mark.parametrize("config", [DEEPSEEK_V3.config, GPT_OSS_20B.config], ids=["deepseek", "gpt-oss"])
def test_without_safetensors_parameters_are_counted(config: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint in another format has a configuration too."""
    model = read(write_model(tmp_path, config))
    assert model.stored is None
    assert "counted from config.json" in weights_of(model.architecture, None, dtype="auto", quantization=None).how


class TestBroken:
    """A clear error with the file's name, quickly and without using much memory."""

    def refused(self, directory: Path) -> str:
        tracemalloc.start()
        try:
            with pytest.raises(ServiceError) as caught:
                read(directory)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 50_000_000
        assert caught.value.status in (404, 422)
        assert str(directory) in caught.value.message
        assert len(caught.value.message) < 600
        return caught.value.message

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "not a safetensors file"),
            (b"\x10\0\0", "not a safetensors file"),
            (b"\xff" * 8, "its header would have 18446744073709551615 bytes"),
            ((100_000_001).to_bytes(8, "little"), "not a safetensors file"),
            ((64_000_000).to_bytes(8, "little") + b"{}", "truncated"),
            ((2).to_bytes(8, "little") + b"xx", "not valid JSON"),
            ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
            ((2).to_bytes(8, "little") + b"\xff\xff", "not valid JSON"),
            ((200_000).to_bytes(8, "little") + b"[" * 200_000, "not valid JSON"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a safetensors file"),
        ],
    )
    def test_header(self, data: bytes, reason: str, tmp_path: Path) -> None:
        """A damaged safetensors header is refused with the reason."""
        directory = write_model(tmp_path, SMALL)
        (directory / "model.safetensors").write_bytes(data)
        assert reason in self.refused(directory)

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            [],
            None,
            7,
            {"dtype": "BF16", "shape": [2]},
            {"dtype": "BF16", "shape": "aa", "data_offsets": [0, 4]},
            {"dtype": 16, "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": [2], "data_offsets": [4]},
            {"dtype": "BF16", "shape": [2], "data_offsets": [4, 0]},
            {"dtype": "BF16", "shape": [2], "data_offsets": ["0", "4"]},
            {"dtype": "BF16", "shape": [-2], "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": [True, 2], "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": ["x", 20_000_000_000], "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": [[0], 20_000_000_000], "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": [10**60], "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": [1] * 1000, "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": [3], "data_offsets": [0, 4]},
            {"dtype": "BF16", "shape": [2, 2.0], "data_offsets": [0, 8]},
        ],
    )
    def test_tensor(self, entry: object, tmp_path: Path) -> None:
        """An invalid tensor entry in the header is refused with the tensor's name."""
        directory = write_model(tmp_path, SMALL)
        write_header(directory / "model.safetensors", {"model.norm.weight": entry}, data_bytes=8)
        assert "'model.norm.weight' has" in self.refused(directory)

    def test_tensors_beyond_the_end_of_the_file(self, tmp_path: Path) -> None:
        """An interrupted download: the header is complete, the tensors are not."""
        directory = write_model(tmp_path, SMALL, llama_tensors(SMALL))
        path = directory / "model.safetensors"
        os.truncate(path, path.stat().st_size - 1)
        assert "is truncated" in self.refused(directory)

    @pytest.mark.parametrize(
        ("index", "reason"),
        [
            ({}, "no weight_map"),
            ({"weight_map": []}, "no weight_map"),
            ({"weight_map": {"a": 7}}, "does not list the weights' files"),
            ({"weight_map": {"a": "../../etc/passwd"}}, "not the name of a file beside it"),
            ({"weight_map": {"a": "/etc/passwd"}}, "not the name of a file beside it"),
            ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "is missing (2 of 2 files are)"),
        ],
    )
    def test_index(self, index: object, reason: str, tmp_path: Path) -> None:
        """An index that lists no files, files elsewhere or missing files is refused with the reason."""
        directory = write_model(tmp_path, SMALL)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        assert reason in self.refused(directory)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"hidden_size": None}, "has no hidden_size"),
            ({"num_hidden_layers": None}, "has no num_hidden_layers"),
            ({"hidden_size": "4096"}, "hidden_size = '4096'"),
            ({"hidden_size": -1}, "hidden_size = -1"),
            ({"hidden_size": True}, "hidden_size = True"),
            ({"hidden_size": 0}, "hidden_size is 0"),
            ({"hidden_size": 1e300}, "hidden_size = 1e+300"),
            ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000"),
            ({"num_hidden_layers": 10_000}, "is more than 4096"),
            ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
            ({"layer_types": {}}, "layer_types = {}"),
            ({"text_config": 7}, "text_config = 7"),
            ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
            ({"rope_scaling": {"type": "linear", "factor": "8"}}, "factor = '8'"),
            ({"tie_word_embeddings": "x" * 10_000}, "tie_word_embeddings"),
            ({"kv_lora_rank": 512}, "has no qk_rope_head_dim"),
            ({"num_experts": 8, "intermediate_size": None}, "has no intermediate_size"),
        ],
    )
    async def test_configuration(self, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
        """A config.json with a missing or invalid field is refused; the message names field and directory and stays
        short."""
        directory = write_model(tmp_path, {**SMALL, **changes})
        with pytest.raises(ModelFilesInvalid) as caught:
            await estimate_of(VllmEstimator(), EngineSpec("m", "vllm", str(directory)), Topology(), {})
        assert reason in caught.value.message
        assert str(directory) in caught.value.message
        assert len(caught.value.message) < 400

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", "nonsense", '{"a": ' * 50_000, "\ud800".encode("utf-8", "surrogatepass")]
    )
    def test_invalid_configuration(self, text: str | bytes, tmp_path: Path) -> None:
        """A config.json that is not a JSON object is refused with the file's name."""
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "config.json" in self.refused(tmp_path)

    def test_a_pipe_in_place_of_a_file(self, tmp_path: Path) -> None:
        """Opening it would block."""
        directory = write_model(tmp_path, SMALL)
        os.mkfifo(directory / "model.safetensors")
        assert "not a regular file" in self.refused(directory)

    def test_a_huge_configuration(self, tmp_path: Path) -> None:
        """A sparse file of 1 TiB is refused by its size, without reading it."""
        (tmp_path / "config.json").touch()
        os.truncate(tmp_path / "config.json", 1 << 40)
        assert "bytes, more than" in self.refused(tmp_path)


class TestPlace:
    """Finding a model by name."""

    def cached(self, cache: Path, name: str, *, ref: str = "main") -> Path:
        """A model in a hub cache, with the layout of the hub's library."""
        repository = cache / f"models--{name.replace('/', '--')}"
        write_model(repository / "snapshots" / "abc123", SMALL, llama_tensors(SMALL))
        (repository / "refs").mkdir()
        (repository / "refs" / ref).write_text("abc123")
        return repository

    @pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
    def test_hub_cache_of_the_engines_environment(self, variable: str, tmp_path: Path) -> None:
        """neuron's own environment may differ."""
        environ = {variable: str(tmp_path)}
        self.cached(hub_cache(environ), "org/model")
        model = model_at("org/model", environ, revision=None, download_dir=None)
        assert (model.source, model.architecture.layers) == ("org/model", 2)
        assert model.stored is not None

    def test_revision_and_download_directory(self, tmp_path: Path) -> None:
        """`--revision` and `--download-dir` of the arguments select the files."""
        self.cached(tmp_path, "org/model", ref="v2")
        with pytest.raises(NotFound, match=r"no config\.json in the hub's cache"):
            model_at("org/model", {"HF_HUB_CACHE": str(tmp_path)}, revision=None, download_dir=None)
        assert model_at("org/model", {}, revision="v2", download_dir=str(tmp_path)).stored is not None

    @pytest.mark.parametrize(
        "source", ["org/model", "a b", "a--b/..", "/nothing/here", "s3://bucket/model", "x" * 400, "org/a/b"]
    )
    def test_not_on_this_host(self, source: str, tmp_path: Path) -> None:
        """Any name that is not cached is a 404; the network is not used."""
        with pytest.raises(NotFound) as caught:
            model_at(source, {"HF_HUB_CACHE": str(tmp_path / "none")}, revision=None, download_dir=None)
        assert caught.value.code == "model_files_not_found"

    @pytest.mark.parametrize("source", ["/" + "x" * 400, "x" * 400])
    def test_an_overlong_path_is_not_below_a_root(self, source: str, tmp_path: Path) -> None:
        """A path too long for the operating system causes no error."""
        assert not is_below(source, [tmp_path])

    def test_a_directory_without_a_model_and_a_file(self, tmp_path: Path) -> None:
        """The error says that config.json is missing, or that the path is a file."""
        (tmp_path / "model.gguf").touch()
        with pytest.raises(NotFound, match=r"no config\.json"):
            read(tmp_path)
        with pytest.raises(NotFound, match="a file, not a directory"):
            read(tmp_path / "model.gguf")

    def test_results_are_cached_until_files_change(self, tmp_path: Path) -> None:
        """The second estimate opens no file; a new configuration takes effect at once."""
        directory = write_model(tmp_path, SMALL, llama_tensors(SMALL))
        first = read(directory)
        assert read(directory) is first
        write_model(directory, {**SMALL, "num_hidden_layers": 1})
        assert read(directory).architecture.layers == 1

    def test_a_shard_that_was_not_downloaded(self, tmp_path: Path) -> None:
        """The cache then has links to missing files, and the estimate is refused."""
        directory = write_model(tmp_path, SMALL, llama_tensors(SMALL), {"a": ("BF16", (2,))})
        shard = directory / "model-00002-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to("../../blobs/nothing")
        with pytest.raises(ModelFilesInvalid, match=r"is missing \(1 of 2 files are\)"):
            read(directory)
