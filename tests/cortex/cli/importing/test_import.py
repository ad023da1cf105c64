"""`cortex import` writes a models.toml that cortex accepts, and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cortex.config.catalogue import load_catalogue
from tests.cortex.cli.importing.import_command import about, imported, run

LLAMA_SWAP = """
healthCheckTimeout: 500
logLevel: info
startPort: 10001
globalTTL: 0
macros:
  "latest-llama": >
    /opt/llama.cpp/llama-server --host 127.0.0.1 --port ${PORT} --flash-attn on -ngl 999 --no-mmap
  models-dir: /mnt/nvme/models
models:
  "qwen3-coder":
    name: "Qwen3 Coder"
    description: "30B A3B"
    cmd: |
      # on the big cards
      ${latest-llama}
      --model ${models-dir}/Qwen3-Coder-30B-A3B-Q8_0.gguf
      --ctx-size 131072 --jinja --temp 0.7
      --tensor-split 1,1 \\
      --alias coder
    aliases: ["gpt-4o-mini", "coder"]
    env: ["CUDA_VISIBLE_DEVICES=0,1", "GGML_CUDA_FORCE_MMQ=1"]
    ttl: 3600
    concurrencyLimit: 4
    filters:
      strip_params: "temperature, top_p"
  "embed":
    cmd: ${latest-llama} -hf nomic-ai/nomic-embed-text-v1.5-GGUF:Q8_0 --embeddings -c 0
    checkEndpoint: /health
    unlisted: true
  "vllm-model":
    proxy: "http://127.0.0.1:9999"
    cmd: >
      env HF_HUB_OFFLINE=1 vllm serve Qwen/Qwen3-32B-AWQ --port 9999 -tp 2 --max-model-len=32768
      --gpu-memory-utilization 0.92 --served-model-name q --quantization awq --enable-auto-tool-choice
      --tool-call-parser hermes --trust-remote-code
    cmdStop: "pkill -f vllm"
  "docker-llama":
    cmd: |
      docker run --name ${MODEL_ID} --init --rm -p ${PORT}:8080 -v /mnt/nvme/models:/models
      ghcr.io/ggml-org/llama.cpp:server-cuda --model '/models/Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf'
    cmdStop: docker stop ${MODEL_ID}
  "whisper":
    cmd: whisper-server --port ${PORT} -m /models/ggml-large-v3.bin
  "elsewhere":
    proxy: http://10.0.0.7:8080
groups:
  forever:
    persistent: true
    swap: false
    exclusive: false
    members: ["embed"]
  coding:
    swap: true
    members: ["qwen3-coder", "vllm-model"]
hooks:
  on_startup:
    preload: ["embed"]
"""

LITELLM = """
model_list:
  - model_name: gpt-4o
    litellm_params:
      model: azure/gpt-4o-eu
      api_base: https://my-endpoint-europe.openai.azure.com/
      api_key: os.environ/AZURE_API_KEY
      rpm: 6
  - model_name: qwen
    litellm_params: &qwen
      model: hosted_vllm/Qwen/Qwen3-32B
      api_base: http://gpu1:8000/v1
      api_key: none
      rpm: 600
      temperature: 0.2
      extra_body: {chat_template_kwargs: {enable_thinking: false}}
    model_info: {max_input_tokens: 32768, max_output_tokens: 8192, input_cost_per_token: 0.0000001}
  - model_name: qwen
    litellm_params: {<<: *qwen, api_base: "http://gpu2:8000/v1"}
  - model_name: local-mistral
    litellm_params:
      model: openai/mistralai/Mistral-Small-3.2
      api_base: http://192.168.1.20:8000/v1
      api_key: sk-1234
      timeout: 300
  - model_name: embeddings
    litellm_params: {model: infinity/BAAI/bge-m3, api_base: "http://gpu1:7997"}
  - model_name: claude
    litellm_params: {model: anthropic/claude-sonnet-4, api_key: os.environ/ANTHROPIC_API_KEY}
  - model_name: "ollama-llama"
    litellm_params: {model: ollama_chat/llama3.1, api_base: "http://localhost:11434"}
  - model_name: "*"
    litellm_params: {model: "openai/*", api_base: "http://gpu3:8000/v1"}
router_settings:
  routing_strategy: usage-based-routing-v2
  model_group_alias: {"gpt-4": "qwen", "old": "gpt-4o"}
litellm_settings:
  num_retries: 3
  fallbacks: [{"qwen": ["gpt-4o"]}]
general_settings:
  master_key: sk-1234
"""

OLLAMA_LIST = """NAME                                               ID              SIZE      MODIFIED
llama3.1:8b                                        46e0c10c039e    4.9 GB    5 weeks ago
hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M  4b7a1f2c0d1e    2.0 GB    3 months ago
hf.co/unsloth/Qwen3-0.6B-GGUF:latest               0a1b2c3d4e5f    610 MB    2 days ago
"""


def test_llama_swap(tmp_path: Path) -> None:
    """Commands become harness, source, context and arguments; aliases, ttl and persistent groups are kept."""
    catalogue, models, notes = imported(tmp_path, "llama-swap", LLAMA_SWAP)
    assert models["qwen3-coder"] == {
        "harness": "llama",
        "source": "/mnt/nvme/models/Qwen3-Coder-30B-A3B-Q8_0.gguf",
        "max_model_len": 131072,
        "args": ("--flash-attn", "on", "-ngl", "999", "--no-mmap", "--jinja", "--temp", "0.7"),
        "idle_ttl_secs": 3600,
        "limit": {"parallel": 4},
    }
    assert models["embed"] == {
        "harness": "llama",
        "source": "nomic-ai/nomic-embed-text-v1.5-GGUF:Q8_0",
        "args": ("--flash-attn", "on", "-ngl", "999", "--no-mmap", "--embeddings"),
        "residency_priority": 1000,
    }
    vllm = catalogue.profile("vllm-model")
    assert vllm is not None
    assert (vllm.harness, vllm.source, vllm.min_devices) == ("vllm", "Qwen/Qwen3-32B-AWQ", 2)
    assert (vllm.max_model_len, vllm.quant) == (32768, "awq")
    assert vllm.args == ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--trust-remote-code")
    assert models["docker-llama"]["source"] == "/models/Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf"
    assert catalogue.targets == {"gpt-4o-mini": "qwen3-coder", "coder": "qwen3-coder"}
    assert set(models) == {"qwen3-coder", "embed", "vllm-model", "docker-llama"}
    for entry, words in (
        ("qwen3-coder", ["--tensor-split 1,1", "CUDA_VISIBLE_DEVICES", "GGML_CUDA_FORCE_MMQ", "filters.strip_params"]),
        ("embed", ["unlisted", "preload"]),
        ("vllm-model", ["--gpu-memory-utilization 0.92", "vram_mb", "HF_HUB_OFFLINE", "allow_code", "cmdStop"]),
        ("docker-llama", ["container"]),
        ("whisper", ["left out", "unknown engine 'whisper-server'"]),
        ("elsewhere", ["left out", "no cmd"]),
        (None, ["healthCheckTimeout", "groups.coding", "startPort"]),
    ):
        for word in words:
            assert word in about(notes, entry), (entry, word)
    assert "checkEndpoint" not in about(notes, "embed")
    text = (tmp_path / "models.toml").read_text(encoding="utf-8")
    for _, note in notes:  # each is a comment of the file, wrapped
        assert " ".join(note.split()) in " ".join(text.replace("\n#  ", " ").split())


def test_litellm(tmp_path: Path) -> None:
    """Own engines become models, names become aliases with the parameters as defaults; services are left out."""
    catalogue, models, notes = imported(tmp_path, "litellm", LITELLM)
    assert models == {
        "Qwen/Qwen3-32B": {
            "harness": "vllm",
            "replicas": {"max": 2},
            "limit": {"rpm": 1200, "context": 32768, "output": 8192},
            "prices": {"input": 0.1},
        },
        "mistralai/Mistral-Small-3.2": {"harness": "vllm"},
        "BAAI/bge-m3": {"harness": "infinity"},
    }
    assert catalogue.targets == {
        "qwen": "Qwen/Qwen3-32B",
        "gpt-4": "Qwen/Qwen3-32B",
        "local-mistral": "mistralai/Mistral-Small-3.2",
        "embeddings": "BAAI/bge-m3",
    }
    qwen = catalogue.alias_of("qwen")
    assert qwen is not None
    assert qwen.default == {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 0.2}
    assert catalogue.alias_of("gpt-4") == qwen  # an alias of that alias
    for entry, word in (
        ("gpt-4o", "azure is a service"),
        ("claude", "anthropic is a service"),
        ("ollama-llama", "cortex import ollama"),
        ("*", "no wildcards"),
        ("mistralai/Mistral-Small-3.2", "a guess"),
        ("mistralai/Mistral-Small-3.2", "timeout"),
        ("old", "not carried over"),
        (None, "fallbacks"),
        (None, "routing_strategy"),
        (None, "general_settings"),
        (None, "num_retries"),
    ):
        assert word in about(notes, entry), (entry, word)
    assert "sk-1234" not in json.dumps(notes) + (tmp_path / "models.toml").read_text(encoding="utf-8")


def test_ollama_list(tmp_path: Path) -> None:
    """Models of the hub can be found again; of the others the list does not say where their files are."""
    catalogue, models, notes = imported(tmp_path, "ollama", OLLAMA_LIST)
    assert models == {
        "hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M": {
            "harness": "llama",
            "vram_mb": 2789,
            "source": "bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M",
        },
        "hf.co/unsloth/Qwen3-0.6B-GGUF:latest": {
            "harness": "llama",
            "vram_mb": 1198,
            "source": "unsloth/Qwen3-0.6B-GGUF",
        },
    }
    assert catalogue.targets == {"hf.co/unsloth/Qwen3-0.6B-GGUF": "hf.co/unsloth/Qwen3-0.6B-GGUF:latest"}
    assert "directory of models" in about(notes, "llama3.1:8b")


def test_ollama_directory(tmp_path: Path) -> None:
    """Its manifests name the GGUF files, which llama.cpp reads as they are."""
    models = tmp_path / "models"
    blobs = models / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "sha256-aa").write_bytes(b"GGUF")
    (blobs / "sha256-bb").write_text('{"num_ctx": 16384, "temperature": 0.6, "stop": ["<|eot|>"]}', encoding="utf-8")
    (blobs / "sha256-cc").write_bytes(b"GGUF")

    def layer(kind: str, digest: str, size: int) -> dict[str, Any]:
        return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": size}

    for place, layers in (
        ("registry.ollama.ai/library/llama3.1/8b", [layer("model", "aa", 4_900_000_000), layer("params", "bb", 60)]),
        (
            "registry.ollama.ai/me/seer/latest",
            [layer("model", "aa", 10**9), layer("projector", "cc", 4), layer("system", "dd", 9)],
        ),
        ("registry.example/library/other/1b", [layer("model", "aa", 10**9)]),
        ("hf.co/org/name-GGUF/Q4_K_M", [layer("model", "aa", 10**9)]),
    ):  # fmt: skip
        path = models / "manifests" / place
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}), encoding="utf-8")
    (models / "manifests" / ".DS_Store").write_bytes(b"\x00\xff")
    ended = run("ollama", "models", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    catalogue = load_catalogue(tmp_path / "models.toml")
    llama = catalogue.profile("llama3.1:8b")
    assert llama is not None
    assert (llama.source, llama.max_model_len, llama.vram_mb) == (str(blobs / "sha256-aa"), 16384, 6108)
    seer = catalogue.profile("me/seer:latest")
    assert seer is not None
    assert seer.args == ("--mmproj", str(blobs / "sha256-cc"))
    assert catalogue.targets["me/seer"] == "me/seer:latest"
    assert catalogue.profile("hf.co/org/name-GGUF:Q4_K_M") is not None
    assert catalogue.profile("registry.example/library/other:1b") is not None
    assert "temperature = 0.6" in ended.stdout
    assert "its system message is left out" in ended.stdout
    assert '[harness.llama]\n  preset = "llama.cpp"' in ended.stdout


def test_a_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text("mine", encoding="utf-8")
    (tmp_path / "list").write_text(OLLAMA_LIST, encoding="utf-8")
    ended = run("ollama", "list", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == ("cortex: models.toml exists: name another file with --output, or replace it with --force\n")
    assert (tmp_path / "models.toml").read_text(encoding="utf-8") == "mine"
    assert run("ollama", "list", "--force", cwd=tmp_path).returncode == 0
    assert len(load_catalogue(tmp_path / "models.toml").models) == 2


def test_a_pipe(tmp_path: Path) -> None:
    """`ollama list | cortex import ollama - -o -`: the file on standard output, the notes on standard error."""
    ended = run("ollama", "-", "-o", "-", stdin=OLLAMA_LIST, cwd=tmp_path)
    assert ended.returncode == 0
    (tmp_path / "models.toml").write_text(ended.stdout, encoding="utf-8")
    assert len(load_catalogue(tmp_path / "models.toml").models) == 2
    assert "llama3.1:8b: left out" in ended.stderr
    both = run("ollama", "-", "-o", "-", "--json", stdin=OLLAMA_LIST, cwd=tmp_path)
    assert (both.returncode, both.stdout) == (1, "")
    assert "--json needs --output FILE" in both.stderr


@pytest.mark.parametrize(
    ("program", "text", "said"),
    [
        ("llama-swap", "models: [", "cannot import file: while parsing"),
        ("llama-swap", "- 1", "it is not a configuration of llama-swap"),
        ("litellm", "{}", "file has no model"),
        ("litellm", "model_list: [{model_name: a, litellm_params: {model: gpt-4o}}]", "a: left out: gpt-4o is"),
        ("ollama", "nothing", "file has no model that cortex can serve"),
        ("llama-swap", "models: {a: {cmd: \"llama-server -m 'x\"}}", "cannot be read: No closing quotation"),
        ("llama-swap", "models: {a: {cmd: llama-server --jinja}}", "a: left out: the command names no model"),
        ("llama-swap", "models: {a: 1, b: {cmd: 7}, c: {}}", "b: left out: unknown engine '7'"),
    ],
)  # fmt: skip
def test_a_file_without_models(tmp_path: Path, program: str, text: str, said: str) -> None:
    """Nothing is written; the reason of each entry is told."""
    (tmp_path / "file").write_text(text, encoding="utf-8")
    ended = run(program, "file", cwd=tmp_path)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert not (tmp_path / "models.toml").exists()


def test_what_models_toml_does_not_allow_is_left_out(tmp_path: Path) -> None:
    """One bad entry costs the others nothing."""
    text = (
        "models: {'two words': {cmd: llama-server -m /a.gguf}, good: {cmd: llama-server -m /b.gguf, aliases: ['x y']}}"
    )
    _, models, notes = imported(tmp_path, "llama-swap", text)
    assert set(models) == {"good"}
    assert "left out" in about(notes, "two words")
