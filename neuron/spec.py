"""What an engine is to be: a load command checked and made complete. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from neuron.config import HarnessName
from neuron.harness.vllm.argument_policy import refusal, shell_word
from shared.errors import InvalidRequest
from shared.protocol import LoadCommand

# Model ids, paths and names as they exist: no flag, no shell word, nothing that is not printed.
_PLAIN_NAME = re.compile(r"/?\w[\w./:@+=,%-]*")
_QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REMOTE = re.compile(r"(?:s3|gs)://.+")
EXTENSIONS = frozenset({"source", "args", "vram_mb", "served_names"})
"""Fields of a load command that a cortex of the seed protocol does not know."""
_MAX_ARGS = 256
_MAX_SERVED_NAMES = 64


@dataclass(frozen=True)
class EngineSpec:
    """One model as one engine serves it. `devices` None leaves the choice to neuron; `vram_mb` in MiB, all devices."""

    model_id: str
    harness: HarnessName
    source: str
    quant: str | None = None
    tensor_parallel: int = 1
    devices: tuple[int, ...] | None = None
    args: tuple[str, ...] = ()
    vram_mb: int | None = None
    served_names: tuple[str, ...] = ()
    said: frozenset[str] = field(default=EXTENSIONS, compare=False)
    """The fields beyond the seed protocol that the command spoke of."""

    @property
    def share_mb(self) -> int | None:
        """MiB on each device that `vram_mb` comes to, rounded up; None when it is not given."""
        return None if self.vram_mb is None else -(-self.vram_mb // self.tensor_parallel)

    def difference(self, wanted: EngineSpec) -> str | None:
        """In what an engine of this spec is not what `wanted` asks for; None when it will do.

        Devices that `wanted` does not name may be any, and so may what only later versions of the protocol can say.
        """
        if wanted.devices is None:
            wanted = replace(wanted, devices=self.devices)
        for name in ("harness", "source", "quant", "tensor_parallel", "devices", "args", "vram_mb", "served_names"):
            if name in EXTENSIONS and name not in wanted.said:
                continue
            mine, theirs = getattr(self, name), getattr(wanted, name)
            if mine != theirs:
                return f"{name} is {mine!r}, asked for {theirs!r}"
        return None


def spec_of(command: LoadCommand, *, harnesses: list[HarnessName]) -> EngineSpec:
    """`command` as a spec; an absent harness is the first of this host's.

    Raises:
        InvalidRequest: naming the field and its value.
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
        raise InvalidRequest(f"quant: {command.quant!r} is no quantization's name", param="quant")
    reason = (
        "there are too many" if len(command.args) > _MAX_ARGS else refusal(command.args) or shell_word(command.args)
    )
    if reason is not None:
        raise InvalidRequest(f"args: {reason}", param="args")
    return EngineSpec(
        model_id=command.model_id,
        harness=_harness(command.harness, harnesses),
        source=source,
        quant=command.quant,
        tensor_parallel=_tensor_parallel(command),
        devices=tuple(command.devices or ()) or None,
        args=tuple(command.args),
        vram_mb=command.vram_mb,
        served_names=tuple(name for name in dict.fromkeys(command.served_names) if name != command.model_id),
        said=frozenset(name for name in EXTENSIONS & command.model_fields_set if getattr(command, name) is not None),
    )


def check_name(field: str, value: str) -> None:
    """Refuses what could be read as a flag, a shell word or a path that climbs out.

    Raises:
        InvalidRequest: naming field and value.
    """
    if value.startswith("-"):
        reason = "it could be read as a flag"
    elif not _PLAIN_NAME.fullmatch(value):
        reason = "only letters, digits and . _ - / : @ + = , % are allowed, beginning with a letter, a digit or /"
    elif ".." in value.split("/"):
        reason = "'..' is not allowed in it"
    else:
        return
    raise InvalidRequest(f"{field}: {value!r} is refused: {reason}", param=field)


def _check_source(source: str, field: str) -> None:
    relative = not source.startswith("/") and not _REMOTE.fullmatch(source)
    if relative and source.count("/") > 1:
        raise InvalidRequest(
            f"{field}: {source!r} is neither an absolute path nor NAME or ORGANISATION/NAME of a model", param=field
        )


def _harness(name: str | None, harnesses: list[HarnessName]) -> HarnessName:
    for known in harnesses:
        if name is None or name == known:
            return known
    offered = ", ".join(harnesses) or "none"
    raise InvalidRequest(f"harness: {name!r} is not offered here (there is: {offered})", param="harness")


def _tensor_parallel(command: LoadCommand) -> int:
    devices = command.devices
    if not devices:
        return command.tensor_parallel or 1
    if len(set(devices)) != len(devices):
        raise InvalidRequest(f"devices: {devices} names a device twice", param="devices")
    wanted = command.tensor_parallel or len(devices)
    if len(devices) != wanted:
        raise InvalidRequest(f"devices: {devices} are {len(devices)}, but tensor_parallel is {wanted}", param="devices")
    return wanted
