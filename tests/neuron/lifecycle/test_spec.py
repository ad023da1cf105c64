"""Which load commands are refused, and how the others become a spec."""

from __future__ import annotations

from typing import Any

import pytest

from neuron.harness.checks import spec_of
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.protocol import LoadCommand

HARNESSES: list[str] = ["vllm", "sim"]


def spec(**fields: Any) -> EngineSpec:
    return spec_of(LoadCommand.model_validate({"model_id": "org/model", **fields}), harnesses=HARNESSES)


BAD_NAMES = [
    "-flag", "--port", "a b", "a\tb", "a\nb", "a\0b", "$(id)", "`id`", "a;b", "a|b", "a&b", "a>b", "a'b", 'a"b', "~/m",
    "{a,b}", "a*", "a?", "!x", "a\\b", "../up", "a/../b", "/models/../etc", "./here", "a\x7f", "a\u2028b",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("field", ["model_id", "source", "served_names"])
def test_refused_names(field: str, name: str) -> None:
    """A flag, a shell word, or a path with `..` is refused with field and value."""
    with pytest.raises(InvalidRequest) as refused:
        spec(**{field: [name] if field == "served_names" else name})
    assert refused.value.param == field
    assert repr(name) in refused.value.message


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B", "m", "/srv/models/q.w-3_b", "org/m@rev", "m:7b", "s3://bucket/a/b", "modèle"]
)
def test_accepted_names(name: str) -> None:
    """Real model names pass."""
    assert spec(model_id=name).source == name


def test_relative_path_is_no_source() -> None:
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
        ["--trust-remote-code"],
        ["-pp", "1"],
        ["--chat-template", "/srv/t.jinja"],
        ["--api-server-count", "2"],
        ["--tokenizer", "org/tok"],
    ],
)
def test_accepted_arguments(args: list[str]) -> None:
    """Flags that only resemble the owned ones, and values of any form, pass unchanged."""
    assert spec(args=args).args == tuple(args)


def test_defaults() -> None:
    """Defaults: one device, the first harness, the id as source; an empty list equals none."""
    assert spec(devices=[], args=None, served_names=None) == EngineSpec("org/model", "vllm", "org/model")


def test_devices_imply_tensor_parallel() -> None:
    """Two named devices mean two ranks."""
    assert spec(devices=[1, 0]).tensor_parallel == 2


def test_served_names_are_told_once() -> None:
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


def test_seed_command_takes_what_it_cannot_speak_of_as_it_is() -> None:
    """A cortex that speaks only protocol v1 joins a model that was loaded with more fields; a contradicting field still
    differs."""
    running = spec(harness="sim", args=["--load-secs", "1"], vram_mb=1000)
    assert running.difference(spec(harness="sim", quant=None, tensor_parallel=None, devices=None)) is None
    assert running.difference(spec(harness="sim", vram_mb=None, source=None)) is None
    others: list[dict[str, Any]] = [{"args": []}, {"vram_mb": 2000}, {"quant": "fp8"}]
    for said in others:
        assert running.difference(spec(harness="sim", **said)) is not None
