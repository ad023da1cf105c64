"""The placeholders of a described engine's command line and environment. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from neuron.harness.base import LaunchFacts, LaunchPlan
from neuron.harness.environment import DeviceIds, device_ids

PLACEHOLDERS: Final = (
    "model",
    "model_path",
    "model_repo",
    "id",
    "names",
    "quant",
    "context",
    "host",
    "port",
    "key",
    "devices",
    "device_count",
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "memory_share",
    "memory_mb",
    "cpu_count",
    "tmp_dir",
)
_PLACEHOLDER: Final = re.compile(r"\{([a-z][a-z_]*)\}")
_MISSPELT: Final = re.compile(r"(?<!\$)\{\s*([A-Za-z][A-Za-z_ -]*?)\s*\}")  # `${PORT}` is a shell's own


def placeholders_in(text: str) -> list[str]:
    """The names in braces, in order: lower-case letters and underscores, so JSON is left alone."""
    return _PLACEHOLDER.findall(text)


def unknown_placeholder(text: str) -> str | None:
    """Why `text` is refused: it has a placeholder that does not exist. None when it has none."""
    for name in placeholders_in(text):
        if name not in PLACEHOLDERS:
            close = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
            hint = f", did you mean {{{close[0]}}}?" if close else ""
            known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
            return f"unknown placeholder {{{name}}}{hint} (known: {known})"
    for found in _MISSPELT.finditer(text):
        meant = re.sub("[ -]", "_", found[1].lower())
        if meant in PLACEHOLDERS and found[0] != f"{{{meant}}}":
            return f"unknown placeholder {found[0]}, did you mean {{{meant}}}?"
    return None


def values_of(plan: LaunchPlan, facts: LaunchFacts, *, by: DeviceIds) -> dict[str, str | None]:
    """The value of each placeholder for one engine; None where it is not known. `by`: how its devices are addressed."""
    spec = plan.spec
    is_path = spec.source.startswith("/")
    ids = device_ids(plan.devices, by)
    return {
        "model": spec.source,
        "model_path": spec.source if is_path else None,
        "model_repo": None if is_path else spec.source,
        "id": spec.model_id,
        "names": ",".join((spec.model_id, *spec.served_names)),
        "quant": spec.quant,
        "context": None if spec.context is None else str(spec.context),
        "host": plan.host,
        "port": str(plan.port),
        "key": plan.api_key,
        "devices": ",".join(ids) or None,
        "device_count": str(spec.device_count),
        "tensor_parallel": str(spec.tensor_parallel),
        "pipeline_parallel": str(spec.pipeline_parallel),
        "data_parallel": str(spec.data_parallel),
        "memory_share": plan.device_fraction,
        "memory_mb": None if plan.share_mb is None else str(plan.share_mb),
        "cpu_count": str(len(plan.cores or facts.cpus)),
        "tmp_dir": str(plan.tmp_dir),
    }


def filled(parts: Iterable[str], values: Mapping[str, str | None]) -> list[str]:
    """The parts of a command line with their placeholders replaced. A part with a placeholder whose value is not known
    is left out, and with it the flag before it, if it is not a flag itself."""
    made: list[str] = []
    for part in parts:
        text = filled_text(part, values)
        if text is not None:
            made.append(text)
        elif made and made[-1].startswith("-") and not part.startswith("-"):
            made.pop()
    return made


def filled_text(text: str, values: Mapping[str, str | None]) -> str | None:
    """`text` with its placeholders replaced; None when the value of one is not known."""
    if any(values[name] is None for name in placeholders_in(text)):
        return None
    return _PLACEHOLDER.sub(lambda found: values[found[1]] or "", text)


def filled_environment(env: Mapping[str, str], values: Mapping[str, str | None]) -> dict[str, str]:
    """The variables with their placeholders replaced, without those for which a value is not known."""
    made = {name: filled_text(text, values) for name, text in env.items()}
    return {name: text for name, text in made.items() if text is not None}


def matching_flag(args: Sequence[str], flags: Sequence[str]) -> tuple[str, str] | None:
    """The first of `args` that could be read as one of `flags`, and that flag; None when none can.

    As argument parsers do it takes `--flag=value`, underscores for dashes and abbreviations of long flags; a flag that
    ends in `*` stands for all that begin with it.
    """
    for arg in args:
        if not arg.startswith("-"):
            continue
        name = arg.partition("=")[0].replace("_", "-")
        for flag in flags:
            wanted = flag.replace("_", "-")
            if wanted.endswith("*"):
                found = name.startswith(wanted[:-1])
            elif wanted.startswith("--"):
                found = len(name) > 2 and wanted.startswith(name)
            else:
                found = name == wanted
            if found:
                return arg, flag
    return None
