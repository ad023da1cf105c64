"""Validates neuron.toml and load commands against the known harnesses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from neuron.config import EngineDescription, HarnessEntry, HarnessSettings, NeuronConfig
from neuron.harness.base import Harness
from neuron.harness.command.placeholders import placeholders_in, unknown_placeholder
from neuron.harness.command.preset_files import on_preset
from neuron.harness.registry import HARNESSES, harness_of
from neuron.spec import EXTENSIONS, EngineSpec
from shared.errors import InvalidRequest
from shared.protocol import FIRST_INSTANCE, GroupPart, LoadCommand, Parallelism, first_problem
from shared.protocol.group import split_over
from shared.protocol.parallel import MAX_DEVICES

# Model ids, paths and names; excludes flags, shell words and unprintable characters.
_PLAIN_NAME = re.compile(r"/?\w[\w./:@+=,%-]*")
_QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REMOTE = re.compile(r"(?:s3|gs)://.+")
_SHELL = re.compile(r"[`;|&<>]|\$[({\w]")
_CONTROL = frozenset(map(chr, (*range(32), 127)))
_FOREIGN_HARNESS = "candle"
"""Built into helexa's neuron. helexa's cortex names it in every load; as an engine it does the same as any of ours."""
_MAX_ARGS = 256
_MAX_SERVED_NAMES = 64


class CheckedHarness(HarnessSettings):
    """`[harness.NAME]` with what its preset says, in which every key makes sense."""

    @model_validator(mode="before")
    @classmethod
    def _on_preset(cls, table: Any) -> Any:
        return on_preset(table) if isinstance(table, Mapping) else table

    @model_validator(mode="after")
    def _consistent(self) -> CheckedHarness:
        given = self.model_fields_set
        if not self.described:
            for key in sorted(given & EngineDescription.model_fields.keys()):
                raise ValueError(f'{key}: only with kind = "command" or a preset')
            return self
        for key in ("sleep_mode", "spare"):
            if key in given:
                raise ValueError(f'{key}: not with kind = "command" or a preset')
        if self.command is None:
            raise ValueError('command: required with kind = "command"')
        words = {
            **{f"command[{place}]": word for place, word in enumerate(self.command)},
            **{f"arguments[{place}]": word for place, word in enumerate(self.arguments)},
            **{f"extra_args[{place}]": word for place, word in enumerate(self.extra_args)},
            **{f"env.{name}": value for name, value in self.env.items()},
        }
        for key, word in words.items():
            reason = unknown_placeholder(word)
            if reason is not None:
                raise ValueError(f"{key} = {word!r}: {reason}")
        if not any("port" in placeholders_in(word) for word in words.values()):
            raise ValueError("command: nothing tells the engine its port: put {port} into command, arguments or env")
        return self


class CheckedConfig(NeuronConfig):
    """neuron.toml in which every harness exists and accepts its `extra_args`."""

    harness: Mapping[str, CheckedHarness] = Field(default_factory=dict)

    @field_validator("harnesses")
    @classmethod
    def _known(cls, entries: list[HarnessEntry] | None, info: ValidationInfo) -> list[HarnessEntry] | None:
        tables: Mapping[str, CheckedHarness] | None = info.data.get("harness")
        if tables is not None:  # else one of them is wrong, and that error comes first
            for entry in entries or ():
                table = tables.get(entry.name)
                if entry.name not in HARNESSES and (table is None or not table.described):
                    raise ValueError(_unknown(entry.name))
        return entries

    @field_validator("harness")
    @classmethod
    def _accepted(cls, tables: Mapping[str, CheckedHarness]) -> Mapping[str, CheckedHarness]:
        for name, table in tables.items():
            if table.described and name in HARNESSES:
                raise ValueError(
                    f"{name}: neuron has its own harness of this name: choose another for a preset or command"
                )
            if not table.described and name not in HARNESSES:
                raise ValueError(_unknown(name))
            reason = control_character(table.extra_args)
            if reason is None and not table.described:
                reason = HARNESSES[name].refused_argument(table.extra_args)
            if reason is not None:
                raise ValueError(f"{name}.extra_args: {reason}")
        return tables


def _unknown(name: str) -> str:
    return (
        f"unknown harness {name!r} (known: {', '.join(HARNESSES)}; for another engine set kind or preset in "
        f"[harness.{name}])"
    )


def spec_of(command: LoadCommand, config: NeuronConfig) -> EngineSpec:
    """`command` as a spec; without a harness it gets the first that this host offers.

    Raises:
        InvalidRequest: names the field and its value.
    """
    check_name("model_id", command.model_id)
    source = command.source if command.source is not None else command.model_id
    check_name("source", source)
    _check_source(source, "model_id" if command.source is None else "source")
    for name in command.served_names:
        check_name("served_names", name)
    if len(command.served_names) > _MAX_SERVED_NAMES:
        raise InvalidRequest(f"served_names: more than {_MAX_SERVED_NAMES}", param="served_names")
    if command.quant is not None and not _QUANTIZATION.fullmatch(command.quant):
        raise InvalidRequest(f"quant: invalid quantization name {command.quant!r}", param="quant")
    name = _harness(command.harness, config.harness_names)
    harness, settings = harness_of(name, config), config.harness_settings(name)
    if len(command.args) > _MAX_ARGS:
        raise InvalidRequest(f"args: more than {_MAX_ARGS}", param="args")
    reason = control_character(command.args) or harness.refused_argument(command.args) or shell_word(command.args)
    if reason is None and not settings.allow_code:
        reason = _runs_code(name, harness, command.args)
    if reason is not None:
        raise InvalidRequest(f"args: {reason}", param="args")
    tool_arguments: tuple[str, ...] = ()
    if command.tools:
        tool_arguments = harness.tool_arguments((source, command.model_id), [*command.args, *settings.extra_args])
    parallel = _parallel(command)
    if command.group is not None:
        _check_group(command.group, name, harness, [*command.args, *settings.extra_args])
    said = {name for name in EXTENSIONS & command.model_fields_set if getattr(command, name) is not None}
    spec = EngineSpec(
        model_id=command.model_id,
        harness=name,
        source=source,
        quant=command.quant,
        tensor_parallel=parallel.tensor,
        pipeline_parallel=parallel.pipeline,
        data_parallel=parallel.data,
        expert_parallel=parallel.expert,
        group=command.group,
        devices=None if command.devices is None else tuple(command.devices),
        args=(*tool_arguments, *command.args),  # of two equal flags the last one counts
        vram_mb=command.vram_mb,
        max_model_len=command.max_model_len,
        max_loras=command.max_loras,
        max_lora_rank=command.max_lora_rank,
        lora_sources=tuple(command.lora_sources),
        served_names=tuple(name for name in dict.fromkeys(command.served_names) if name != command.model_id),
        instance=command.instance or FIRST_INSTANCE,
        variant=command.variant,
        said=frozenset(said | {"args"} if tool_arguments else said),
    )
    _check_harness_can(spec, harness)
    return spec


def _check_harness_can(spec: EngineSpec, harness: Harness) -> None:
    """Raises InvalidRequest: engines of this kind cannot be what `spec` wants."""
    unable = harness.refused_spec(spec)
    if unable is None and spec.max_loras is not None and harness.adapters is None:
        unable = "max_loras", "they take no LoRA adapters"
    if unable is not None:
        raise InvalidRequest(
            f"{unable[0]}: engines of the harness {spec.harness!r} cannot do this: {unable[1]}", param=unable[0]
        )


def check_name(field: str, value: str) -> None:
    """Refuses a name that could be read as a flag, a shell word or a path with `..`.

    Raises:
        InvalidRequest: names the field and its value.
    """
    if value.startswith("-"):
        reason = "it could be read as a flag"
    elif not _PLAIN_NAME.fullmatch(value):
        reason = "only letters, digits and . _ - / : @ + = , % are allowed, beginning with a letter, a digit or /"
    elif ".." in value.split("/"):
        reason = "'..' is not allowed"
    else:
        return
    raise InvalidRequest(f"{field}: {value!r} is not a valid name: {reason}", param=field)


def control_character(args: Sequence[str]) -> str | None:
    """Why one of `args` is refused: it contains control characters. None when none does."""
    return next((f"{arg!r} contains control characters" for arg in args if not _CONTROL.isdisjoint(arg)), None)


def shell_word(args: Sequence[str]) -> str | None:
    """Why one of `args` is refused in a load command: it could be read as a shell word, or is a path with `..`.

    neuron never uses a shell, but an operator's engine command may be a script that does. JSON values are exempt:
    engines need them, and they contain such characters by nature.
    """
    for arg in args:
        value = arg.partition("=")[2] if arg.startswith("-") else arg
        if value.startswith(("{", "[")):
            continue
        if ".." in value.split("/"):
            return f"{arg!r}: '..' is not allowed"
        if _SHELL.search(value):
            return f"{arg!r} could be read as a shell word"
    return None


def _runs_code(name: str, harness: Harness, args: Sequence[str]) -> str | None:
    arg = harness.code_argument(args)
    if arg is None:
        return None
    return (
        f"{arg!r} can make the engine run code of a model, a file or another host: "
        f"to allow it, set allow_code = true in [harness.{name}] of this host's neuron.toml"
    )


def _check_source(source: str, field: str) -> None:
    relative = not source.startswith("/") and not _REMOTE.fullmatch(source)
    if relative and source.count("/") > 1:
        raise InvalidRequest(
            f"{field}: {source!r} is neither an absolute path nor a model name (NAME or ORGANISATION/NAME)", param=field
        )


def _harness(name: str | None, harnesses: list[str]) -> str:
    for known in harnesses:
        if name in (None, known, _FOREIGN_HARNESS):
            return known
    offered = ", ".join(harnesses) or "none"
    raise InvalidRequest(f"harness: {name!r} is not offered here (offered: {offered})", param="harness")


def _parallel(command: LoadCommand) -> Parallelism:
    """How the command splits the model; without `parallel` and `tensor_parallel` over all its `devices`."""
    devices = command.devices or []
    if len(set(devices)) != len(devices):
        raise InvalidRequest(f"devices: {devices} lists a device twice", param="devices")
    if command.parallel is None:
        if len(devices) > MAX_DEVICES:
            raise InvalidRequest(
                f"devices: {len(devices)} entries, at most {MAX_DEVICES} are possible", param="devices"
            )
        wanted = Parallelism(tensor=command.tensor_parallel or max(1, len(devices)))
        needed = f"tensor_parallel is {wanted.tensor}"
    else:
        try:
            wanted = command.parallel.with_tensor(command.tensor_parallel)
        except ValueError as error:
            raise InvalidRequest(f"tensor_parallel: {_reason(error)}", param="tensor_parallel") from error
        needed = f"parallel needs {wanted.devices} ({wanted})"
    count = wanted.devices
    if command.group is not None:
        try:
            count = split_over(wanted, command.group.size).devices
        except ValueError as error:
            raise InvalidRequest(f"parallel: {error}", param="parallel") from error
        needed = f"{command.group} has {count} of {wanted}"
    if devices and len(devices) != count:
        raise InvalidRequest(f"devices: {devices} has {len(devices)} entries, but {needed}", param="devices")
    return wanted


def _check_group(part: GroupPart, name: str, harness: Harness, args: Sequence[str]) -> None:
    """Raises InvalidRequest: engines of this kind cannot span hosts, or not with `args`."""
    if not harness.spans_hosts:
        raise InvalidRequest(f"group: engines of the harness {name!r} cannot span hosts", param="group")
    reason = harness.refused_in_group(args)
    if reason is not None:
        raise InvalidRequest(f"args: {reason}, but this is {part}", param="args")


def _reason(error: ValueError) -> str:
    return first_problem(error)[1] if isinstance(error, ValidationError) else str(error)
