"""Which load commands are refused, and how the others become a spec."""

from __future__ import annotations

import json
from typing import Any

import pytest

from neuron.config import HarnessSettings, NeuronConfig
from neuron.engine import records
from neuron.engine.records import RunRecord
from neuron.harness.checks import spec_of
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.protocol import LoadCommand, Parallelism

CONFIG = NeuronConfig.model_validate({"harnesses": [{"name": "vllm"}, {"name": "sim"}]})
TRUSTING = CONFIG.model_copy(update={"harness": {"vllm": HarnessSettings(allow_code=True)}})


def spec(config: NeuronConfig = CONFIG, **fields: Any) -> EngineSpec:
    return spec_of(LoadCommand.model_validate({"model_id": "org/model", **fields}), config)


BAD_NAMES = [
    "-flag", "--port", "a b", "a\tb", "a\nb", "a\0b", "$(id)", "`id`", "a;b", "a|b", "a&b", "a>b", "a'b", 'a"b', "~/m",
    "{a,b}", "a*", "a?", "!x", "a\\b", "../up", "a/../b", "/models/../etc", "./here", "a\x7f", "a\u2028b",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("field", ["model_id", "source", "served_names"])
def test_refused_names(field: str, name: str) -> None:
    """A flag, a shell word, or a path with `..` is refused with field and value."""
    with pytest.raises(InvalidRequest) as refused:
        spec(CONFIG, **{field: [name] if field == "served_names" else name})
    assert refused.value.param == field
    assert repr(name) in refused.value.message


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B", "m", "/srv/models/q.w-3_b", "org/m@rev", "m:7b", "s3://bucket/a/b", "modèle"]
)
def test_accepted_names(name: str) -> None:
    """Real model names pass."""
    assert spec(model_id=name).source == name


def test_source_must_not_be_a_relative_path() -> None:
    """A path is fine as an id; as a source it must be absolute, or a name on a hub."""
    assert spec(model_id="team/a/b", source="/m").model_id == "team/a/b"
    with pytest.raises(InvalidRequest, match="neither an absolute path"):
        spec(source="models/a/b")


@pytest.mark.parametrize("quant", ["-q", "a b", "", "fp8;x", "fp8\n"])
def test_refused_quantization(quant: str) -> None:
    """These also become words of a command line."""
    with pytest.raises(InvalidRequest) as refused:
        spec(quant=quant)
    assert refused.value.param == "quant"


@pytest.mark.parametrize(
    "arg",
    [
        "--host", "--host=0.0.0.0", "--port", "--por", "--p", "--uds", "--root-path", "--root_path=/x", "--api-key",
        "--api_key", "--api", "--served-model-name", "--served_model_name=x", "--served", "--tensor-parallel-size",
        "--tensor_parallel_size=2", "--tensor", "-tp", "-tp=2", "-t", "--ssl-keyfile", "--ssl_certfile=x", "--ssl-",
        "-pp", "-pp=1", "-p", "--pipeline-parallel-size=2", "--pipe", "-dp", "-d", "--data_parallel_size", "--data-par",
        "-dpl", "--data-parallel-size-local=1", "-dpn", "-dpr", "-dph", "-dpe", "-dpm", "--data-parallel-rank", "-ep",
        "-e", "--enable-expert-parallel", "--enable_expert", "--no-enable-expert-parallel", "--no-enable-exp", "-pcp",
        "--no-data-parallel-hybrid-lb", "--data-parallel-external", "--nnodes", "-n", "-n2", "--node_rank=1", "-r1",
        "--config", "--config=x.yaml", "--conf", "--headless", "--model", "--device-ids", "--", "a\0b", "a\nb",
    ],
)  # fmt: skip
def test_refused_arguments(arg: str) -> None:
    """Arguments that neuron sets cannot be overridden, in any spelling that vLLM's parser accepts."""
    with pytest.raises(InvalidRequest) as refused:
        spec(args=["--max-model-len", "4096", arg])
    assert refused.value.param == "args"


@pytest.mark.parametrize(
    "args",
    [
        ["--max-model-len", "32k"],
        ["--config-format", "hf"],
        ["--model-impl", "auto"],
        ["--hf-overrides", '{"a": "b c"}'],
        ["--no-trust-remote-code"],
        ["--trust-request-chat-template"],
        ["--reasoning-parser", "qwen3"],
        ["--tool-call-parser", "hermes"],
        ["--worker-use-ray"],
        ["--distributed-executor-backend", "mp"],
        ["--hf-overrides", '{"architectures": ["Qwen3ForCausalLM"], "text_config.rope": "a.b"}'],
        ["--quantization-config", '{"ignore": ["lm_head.weight"]}'],
        ["--speculative-config", '{"method": "ngram", "model": "Qwen/Qwen3-0.6B", "num_speculative_tokens": 3}'],
        ["--compilation-config", '{"cudagraph_capture_sizes": [1, 2]}', "--compilation-config.mode", "3"],
        ["--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'],
        ["--limit-mm-per-prompt.image", "2"],
        ["-dcp", "1"],
        ["--chat-template", "/srv/t.jinja"],
        ["--api-server-count", "2"],
        ["--tokenizer", "org/tok"],
    ],
)
def test_accepted_arguments(args: list[str]) -> None:
    """Flags that only resemble the owned ones, and values of any form, pass unchanged."""
    assert spec(args=args).args == tuple(args)


@pytest.mark.parametrize(
    "args",
    [
        ["--trust-remote-code"],
        ["--trust_remote_code"],
        ["--trust-remote"],
        ["--tru"],
        ["--trust-remote-code=true"],
        ["--middleware", "evil.Middleware"],
        ["--middleware=evil.Middleware"],
        ["--middle", "evil.Middleware"],
        ["--logits-processors", "evil:Processor"],
        ["--logits_processors=evil:Processor"],
        ["--model-class-overrides", '{"A": "evil:B"}'],
        ["--model-class-overrides.A", "evil:B"],
        ["--tool-parser-plugin", "/tmp/evil.py"],
        ["--reasoning-parser-plugin", "/tmp/evil.py"],
        ["--reasoning-parser-p", "/tmp/evil.py"],
        ["--worker-cls", "evil.Worker"],
        ["--worker_extension_cls=evil.Worker"],
        ["--scheduler-cls", "evil.Scheduler"],
        ["--distributed-executor-backend", "evil.Executor"],
        ["--distributed-executor=evil.Executor"],
        ["--log-config-file", "/tmp/evil.json"],
        ["--logging-config", '{"pylogging_config_file": "/tmp/evil.json"}'],
        ["--logging-config.pylogging_config_file", "/tmp/evil.json"],
        ["--kv-transfer-config", '{"kv_connector": "C", "kv_connector_module_path": "evil"}'],
        ["--kv-transfer-config.kv_connector_module_path", "evil"],
        ["--kv_transfer_config.kv_connector_module_path=evil"],
        ["--kv-transfer-config.kv_connector_extra_config", '{"spec_module_path": "evil"}'],
        ["--kv-transfer-config", '{"kv_connector_extra_config": {"tiers": [{"module_path": "evil"}]}}'],
        ["--ec-transfer-config", '{"ec_connector_module_path": "evil"}'],
        ["--ec-manager-config", '{"encoder_cache_manager_cls": "evil.Manager"}'],
        ["--compilation-config", '{"mode": 1, "backend": "evil.backend"}'],
        ["-cc", '{"mode": 1, "backend": "evil\\u002ebackend"}'],
        ["-cc.backend", "evil.backend"],
        ["-cc.backend=evil.backend"],
        ["-cc.pass.names+", "a,evil.backend"],
        ["--compilation-config.inductor_passes", '{"a": "os.system"}'],
        ["--speculative-config", '{"method": "custom_class", "model": "evil.Proposer"}'],
        ["-sc.method", "custom_class"],
        ["--spec-method", "custom_class"],
        ["--spec-method=custom_class"],
        ["--data-parallel-address=203.0.113.1"],
        ["-dpa", "203.0.113.1"],
        ["--a-flag-of-tomorrow", '{"plugin": "evil.Plugin"}'],
    ],
    ids=" ".join,
)
def test_arguments_that_run_code(args: list[str]) -> None:
    """A load command must not run code of its author on this host: in no spelling that vLLM's parser understands."""
    for harness in ("vllm", "sim"):
        with pytest.raises(InvalidRequest) as refused:
            spec(harness=harness, args=["--max-model-len", "4096", *args])
        assert refused.value.param == "args"
        assert f"allow_code = true in [harness.{harness}]" in refused.value.message
    assert spec(TRUSTING, args=args).args == tuple(args)
    with pytest.raises(InvalidRequest):  # the key is for one harness
        spec(TRUSTING, harness="sim", args=args)


def test_defaults() -> None:
    """Defaults: one device, the first harness, the id as source. An empty list of devices means the CPU."""
    assert spec(devices=None, args=None, served_names=None) == EngineSpec("org/model", "vllm", "org/model")
    assert not spec(devices=None).without_devices
    assert spec(devices=[]).without_devices


def test_devices_imply_tensor_parallel() -> None:
    """Two named devices mean two ranks."""
    assert spec(devices=[1, 0]).tensor_parallel == 2


def test_served_names_are_passed_once() -> None:
    """Duplicates and the id itself add nothing."""
    assert spec(served_names=["a", "org/model", "a", "b"]).served_names == ("a", "b")


def test_difference() -> None:
    """Names the first field that differs; devices match anything when none are asked for."""
    running = spec(devices=[1], quant="fp8")
    assert running.difference(spec(quant="fp8")) is None
    assert running.difference(spec(quant="fp8", devices=[0])) == "devices is (1,), asked for (0,)"
    assert running.difference(spec()) == "quant is 'fp8', asked for None"


@pytest.mark.parametrize(
    "arg",
    ["$(reboot)", "; rm -rf /", "`id`", "a && b", "x | sh", "> /etc/passwd", "${HOME}", "../../etc/passwd", "--f=../x"],
)
def test_refused_arguments_from_outside(arg: str) -> None:
    """Shell words and `..` paths, as a value and after a flag."""
    for args in ([arg], ["--chat-template", arg]):
        with pytest.raises(InvalidRequest) as refused:
            spec(args=args)
        assert repr(arg) in refused.value.message


@pytest.mark.parametrize(
    "args", [["--max-model-len", "8k"], ["--override", '{"a": "x|y; $z"}'], ["--override=[1, 2]"], ["--rope", "a..b"]]
)
def test_json_arguments(args: list[str]) -> None:
    """JSON values may contain anything."""
    assert list(spec(args=args).args) == args


def test_protocol_v1_command_matches_any_value_of_newer_fields() -> None:
    """A cortex that speaks only protocol v1 joins a model that was loaded with more fields; a contradicting field still
    differs."""
    running = spec(harness="sim", args=["--load-secs", "1"], vram_mb=1000)
    assert running.difference(spec(harness="sim", quant=None, tensor_parallel=None, devices=None)) is None
    assert running.difference(spec(harness="sim", vram_mb=None, source=None)) is None
    others: list[dict[str, Any]] = [{"args": []}, {"vram_mb": 2000}, {"quant": "fp8"}]
    for said in others:
        assert running.difference(spec(harness="sim", **said)) is not None


def test_parallel_of_a_command() -> None:
    """`parallel` says how a model is split; its tensor size may come from `tensor_parallel`."""
    made = spec(parallel={"tensor": 2, "pipeline": 2, "data": 2}, devices=list(range(8)))
    assert (made.tensor_parallel, made.pipeline_parallel, made.data_parallel, made.device_count) == (2, 2, 2, 8)
    assert not made.expert_parallel
    assert spec(tensor_parallel=4, parallel={"data": 2, "expert": True}).parallel == Parallelism(
        tensor=4, data=2, expert=True
    )
    assert spec(tensor_parallel=2, parallel={"tensor": 2}).parallel == Parallelism(tensor=2)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tensor_parallel": 4, "parallel": {"tensor": 2}}, "tensor_parallel", "4, but parallel.tensor is 2"),
        ({"tensor_parallel": 64, "parallel": {"data": 2}}, "tensor_parallel", "needs 128 devices, at most 64"),
        ({"parallel": {"pipeline": 2}, "devices": [0]}, "devices", r"1 entries, but parallel needs 2 \(tensor 1 x"),
        ({"parallel": {"pipeline": 2}, "devices": [1, 1]}, "devices", "lists a device twice"),
        ({"devices": list(range(65))}, "devices", "65 entries, at most 64"),
    ],
)
def test_contradicting_parallel(fields: dict[str, Any], param: str, message: str) -> None:
    """The error names the field that contradicts, and both values."""
    with pytest.raises(InvalidRequest, match=message) as refused:
        spec(**fields)
    assert refused.value.param == param


def test_another_split_is_another_spec() -> None:
    """A command that says `parallel` must match the running engine's; one of protocol v1 does not say it."""
    running = spec(parallel={"tensor": 2, "pipeline": 2})
    assert running.difference(spec(parallel={"tensor": 2, "pipeline": 2})) is None
    assert running.difference(spec(tensor_parallel=2)) is None
    changed = running.difference(spec(parallel={"tensor": 2, "data": 2}))
    assert changed == "parallel is tensor 2 x pipeline 2 x data 1, asked for tensor 2 x pipeline 1 x data 2"
    assert spec(tensor_parallel=2).difference(spec(parallel={"tensor": 2, "expert": True})) is not None


def test_records_hold_the_split() -> None:
    """A later neuron reads the same spec; without a split the record is as an earlier version wrote it."""
    split = spec(parallel={"tensor": 2, "pipeline": 2, "data": 2, "expert": True})
    record = RunRecord.model_validate(
        {**_RECORD, "spec": json.loads(json.dumps(records.spec_fields(split)))},
    )
    assert record.engine_spec == split
    assert not records.spec_fields(spec(tensor_parallel=2)).keys() & {
        "pipeline_parallel",
        "data_parallel",
        "expert_parallel",
    }


_RECORD = {
    **{"boot_id": "b", "number": 1, "engine_id": "i/1", "devices": [0], "booked_mb": [1], "host": "127.0.0.1"},
    **{"port": 20000, "tmp_dir": "/tmp/x", "started_at": 1.0},
}
