"""Reads the command line of an engine into keys of models.toml. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from cortex.cli.importing.carried import CarriedOver
from shared.protocol.reserved_arguments import owned_flag

LLAMA: Final = "llama"
VLLM: Final = "vllm"
SGLANG: Final = "sglang"

_SET_BY_NEURON: Final = {
    LLAMA: {"--host": 1, "--port": 1, "--api-key": 1, "--alias": 1, "-a": 1, "--metrics": 0, "--reuse-port": 0},
    VLLM: {"--host": 1, "--port": 1, "--api-key": 1, "--served-model-name": 1, "--uvicorn-log-level": 1},
    SGLANG: {"--host": 1, "--port": 1, "--api-key": 1, "--served-model-name": 1, "--enable-metrics": 0},
}
"""Flags that have no meaning any more, with the number of their values."""
_SOURCE: Final = {
    LLAMA: ("-m", "--model", "-hf", "-hfr", "--hf-repo"),
    VLLM: ("--model",),
    SGLANG: ("--model-path", "--model"),
}
_CONTEXT: Final = {
    LLAMA: ("-c", "--ctx-size"),
    VLLM: ("--max-model-len",),
    SGLANG: ("--context-length",),
}
_SPLIT: Final = {
    "tensor": ("--tensor-parallel-size", "-tp", "--tp-size", "--tp"),
    "pipeline": ("--pipeline-parallel-size", "-pp", "--pp-size"),
    "data": ("--data-parallel-size", "-dp", "--dp-size"),
}
_OF_DEVICES: Final = (
    "-ts", "--tensor-split", "-mg", "--main-gpu", "-dev", "--device", "--base-gpu-id", "--gpu-id-step"
)  # fmt: skip
_MEMORY: Final = ("--gpu-memory-utilization", "--mem-fraction-static")
_CODE: Final = ("--trust-remote-code", "--rpc", "--tools")
_NOT_CARRIED: Final = {
    "-mu": "give a file on the hosts, or a repository of the hub, as source",
    "--model-url": "give a file on the hosts, or a repository of the hub, as source",
    "-hft": "set HF_TOKEN in `env` of [harness.NAME] in neuron.toml",
    "--hf-token": "set HF_TOKEN in `env` of [harness.NAME] in neuron.toml",
    "--admin-api-key": "neuron gives each engine a key of its own",
    "--api-key-file": "neuron gives each engine a key of its own",
    "--lora-modules": "write an entry with `base` and `lora` for each adapter",
    "--slot-save-path": "put it into extra_args of neuron.toml",
    "--log-file": "neuron keeps the output: `cortex logs`",
    "--path": "put it into extra_args of neuron.toml",
}
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_SECRET: Final = ("-hft", "--hf-token", "--admin-api-key", "--ssl-keyfile-password")
"""Flags whose value is not shown."""
_CONTAINER_SWITCHES: Final = frozenset((
    "--detach", "--disable-content-trust", "--env-host", "--help", "--http-proxy", "--init", "--interactive",
    "--no-healthcheck", "--no-hosts", "--oom-kill-disable", "--passwd", "--privileged", "--publish-all", "--quiet",
    "--read-only", "--read-only-tmpfs", "--replace", "--rm", "--rmi", "--sig-proxy", "--tls-verify", "--tty",
    "--unsetenv-all", "--use-api-socket",
))  # fmt: skip
"""Options of `docker run` and `podman run` without a value."""
_SHORT_CONTAINER_SWITCHES: Final = "dhiPqt"


def read_command(text: str, entry: str, found: CarriedOver) -> dict[str, Any] | None:
    """The keys `harness`, `source`, `args` and the like for this command; None for an unknown engine or without
    a model. What it cannot carry over is noted for `entry`."""
    lines = map(str.strip, text.splitlines())
    try:
        words = shlex.split(" ".join(line.rstrip("\\") for line in lines if not line.startswith("#")))
    except ValueError as error:
        found.note(entry, f"left out: the command cannot be read: {error}")
        return None
    words = _without_environment(words, entry, found)
    harness, arguments = _engine(words, entry, found)
    if harness is None:
        program = words[0] if words else "nothing"
        found.note(
            entry,
            f"left out: unknown engine {program!r}; describe it as [harness.NAME] in neuron.toml (docs/harnesses.md)",
        )
        return None
    keys = _Arguments(harness, entry, found).read(arguments)
    if "source" not in keys:
        found.note(entry, "left out: the command names no model")
        return None
    if harness != VLLM:
        found.harnesses.add(harness)
    return {"harness": harness, **keys}


def note_environment(names: Sequence[str], entry: str, found: CarriedOver) -> None:
    """Notes environment variables of an engine."""
    for name in names:
        if name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            found.note(entry, f"{name}: left out; neuron chooses the GPUs, pinned_on the host")
        else:
            found.note(entry, f"the variable {name}: left out; set it in `env` of [harness.NAME] in neuron.toml")


def _without_environment(words: list[str], entry: str, found: CarriedOver) -> list[str]:
    """Without `env` and the assignments before the program."""
    if words and PurePosixPath(words[0]).name == "env":
        words = words[1:]
    count = next((place for place, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word)), len(words))
    note_environment([word.partition("=")[0] for word in words[:count]], entry, found)
    return words[count:]


def _engine(words: list[str], entry: str, found: CarriedOver) -> tuple[str | None, list[str]]:
    """The harness, and the arguments after the program."""
    program = PurePosixPath(words[0]).name if words else ""
    if program in ("docker", "podman"):
        return _in_container(words, entry, found)
    if program in ("llama-server", "server", "llama-server.exe"):
        return LLAMA, words[1:]
    if program == "vllm" and words[1:2] == ["serve"]:
        return VLLM, _named_model(words[2:])
    if re.fullmatch(r"python[\d.]*", program) and "-m" in words[:-1]:
        module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if module.startswith("vllm.entrypoints"):
            return VLLM, rest
        if module == "sglang.launch_server":
            return SGLANG, rest
    return None, []


def _in_container(words: list[str], entry: str, found: CarriedOver) -> tuple[str | None, list[str]]:
    image, program, arguments = _container(words)
    images = {"llama.cpp": LLAMA, "llama-cpp": LLAMA, "vllm": VLLM, "sglang": SGLANG}
    harness, rest = _engine([*program, *arguments], entry, found)
    if harness is None and not program:  # the image's own program
        harness = next((name for mark, name in images.items() if mark in image), None)
        rest = _named_model(arguments) if harness == VLLM else arguments
    if harness is not None:
        found.note(entry, "ran in a container: neuron starts programs of the host, so paths must be those of the host")
    return harness, rest


def _container(words: list[str]) -> tuple[str, list[str], list[str]]:
    """Of `docker run`: the image, the program of --entrypoint if there is one, and the arguments."""
    rest, program = words[words.index("run") + 1 :] if "run" in words else [], list[str]()
    while rest and rest[0].startswith("-"):
        option, equals, value = rest.pop(0).partition("=")
        if not equals and _takes_value(option):
            value = rest.pop(0) if rest else ""
        if option == "--entrypoint" and value:
            program = [value]
    return (rest[0], program, rest[1:]) if rest else ("", program, [])


def _takes_value(option: str) -> bool:
    """True if the next word is the value of this option of a container."""
    if option.startswith("--"):
        return option not in _CONTAINER_SWITCHES
    return len(option[1:].lstrip(_SHORT_CONTAINER_SWITCHES)) == 1  # longer: the value follows without a space


def _named_model(arguments: list[str]) -> list[str]:
    """vLLM's arguments with the model, which may come first without a flag, as `--model`."""
    return ["--model", *arguments] if arguments and not arguments[0].startswith("-") else arguments


class _Arguments:
    """Reads the arguments of one engine."""

    def __init__(self, harness: str, entry: str, found: CarriedOver) -> None:
        self._harness = harness
        self._entry = entry
        self._found = found
        self._keys: dict[str, Any] = {}
        self._split: dict[str, int] = {}
        self._kept: list[str] = []

    def read(self, arguments: list[str]) -> dict[str, Any]:
        rest = list(arguments)
        while rest:
            word = rest.pop(0)
            flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            flag = flag.replace("_", "-")  # as vLLM and llama.cpp do
            if not self._takes(flag, lambda given=value if equals else None, rest=rest: _value(given, rest)):
                self._kept.append(word)
        self._finish()
        return self._keys

    def _takes(self, flag: str, value: Any) -> bool:
        """False for a flag or a value that is passed on as it is."""
        harness, note = self._harness, self._note
        switches = _SET_BY_NEURON[harness]
        if flag in switches:
            if switches[flag]:
                value()
        elif flag in _SOURCE[harness]:
            self._keys["source"] = value()
        elif flag in _CONTEXT[harness]:
            self._context(flag, value())
        elif harness != LLAMA and (kind := _kind_of_split(flag)) is not None:
            self._split_over(kind, flag, value())
        elif harness != LLAMA and flag in ("--quantization", "-q"):
            self._keys["quant"] = value()
        elif (advice := _why_left_out(flag)) is not None:
            text = value()
            note(f"{flag if flag in _SECRET else f'{flag} {text}'}: left out; {advice}")
        elif harness == VLLM and flag.startswith("-") and owned_flag(flag) is not None:
            note(f"{flag}: left out; neuron sets it")
        else:
            if flag in _CODE:
                note(f"{flag} runs code: it needs allow_code = true in [harness.{harness}] of neuron.toml")
            return False
        return True

    def _context(self, flag: str, value: str) -> None:
        if value.isdecimal() and int(value):
            self._keys["max_model_len"] = int(value)
        elif value != "0":  # llama.cpp's own default
            self._kept += [flag, value]

    def _split_over(self, kind: str, flag: str, value: str) -> None:
        if value.isdecimal() and int(value):
            self._split[kind] = int(value)
        else:
            self._note(f"{flag} {value}: left out; set min_devices")

    def _finish(self) -> None:
        source = self._keys.get("source", "")
        if source.startswith((".", "~", "$")) or (source.count("/") > 1 and not source.startswith("/")):
            self._note(f"source = {source!r} must be an absolute path on the hosts, or a repository of the hub")
        tensor = self._split.get("tensor", 1)
        if self._split.keys() - {"tensor"}:
            self._keys["parallel"] = self._split
        elif tensor > 1:
            self._keys["min_devices"] = tensor
        if self._kept:
            self._keys["args"] = self._kept

    def _note(self, text: str) -> None:
        self._found.note(self._entry, text)


def _why_left_out(flag: str) -> str | None:
    """What to do instead of this flag, which has a value; None if it can be carried over."""
    if flag in _OF_DEVICES:
        return "neuron chooses the GPUs"
    if flag in _MEMORY:
        return "set vram_mb, the memory of the whole model in MiB"
    if flag.startswith("--ssl-"):
        return "neuron and cortex have TLS of their own"
    return _NOT_CARRIED.get(flag)


def _kind_of_split(flag: str) -> str | None:
    return next((kind for kind, flags in _SPLIT.items() if flag in flags), None)


def _value(given: str | None, rest: list[str]) -> str:
    """A flag's value: behind `=`, or the next word. A few flags need none, as vLLM's --hf-token."""
    if given is not None:
        return given
    return rest.pop(0) if rest and not rest[0].startswith("--") else ""


def expanded(text: str, macros: Mapping[str, str]) -> str:
    """`${NAME}` replaced by macros, which may use others."""
    for _ in range(10):
        after = re.sub(r"\$\{([\w.-]+)\}", lambda name: macros.get(name[1], name[0]), text)
        if after == text:
            break
        text = after
    return text
