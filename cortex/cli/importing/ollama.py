"""Reads what Ollama has: its directory of models, or what `ollama list` prints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from cortex.cli.importing.carried import CarriedOver
from cortex.cli.importing.command_line import LLAMA

_LAYER: Final = "application/vnd.ollama.image."
_NOT_IN_NAMES: Final = ("registry.ollama.ai/", "library/")
"""What Ollama leaves out of a model's name: its own registry, and the namespace of that registry's own models."""
_UNITS: Final = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_LINE: Final = re.compile(r"(?P<name>\S+)\s+\S+\s+(?P<size>[\d.]+)\s*(?P<unit>[KMGT]B)\b.*")
_HUB: Final = ("hf.co/", "huggingface.co/")
_EXTRA_SHARE: Final = 1.2  # of the weights, with the KV cache of a usual context
_EXTRA_MB: Final = 500


class OllamaModel(NamedTuple):
    """`name`: as Ollama calls it, `NAME:TAG`. `path`: its GGUF file, None if it is not known. `parameters`: those of
    its Modelfile. `others`: what else it has, such as `template`."""

    name: str
    size_bytes: float
    path: Path | None = None
    parameters: Mapping[str, Any] = {}
    projector: Path | None = None
    others: tuple[str, ...] = ()


def read_list(text: str) -> CarriedOver:
    """From what `ollama list` prints. Pure."""
    lines = (_LINE.fullmatch(line.strip()) for line in text.splitlines())
    return _carried(
        OllamaModel(line["name"], float(line["size"]) * _UNITS[line["unit"]]) for line in lines if line is not None
    )


def read_directory(directory: Path) -> CarriedOver:
    """From Ollama's directory of models, which has `manifests` and `blobs`.

    Raises:
        OSError: it cannot be read.
    """
    manifests = directory / "manifests"
    if not manifests.is_dir():
        raise FileNotFoundError(
            f"{directory} has no `manifests`: give Ollama's directory of models, such as "
            "/usr/share/ollama/.ollama/models or ~/.ollama/models"
        )
    paths = (path for path in sorted(manifests.rglob("*")) if path.is_file())
    return _carried(each for path in paths if (each := _of_manifest(directory, manifests, path)) is not None)


def _of_manifest(directory: Path, manifests: Path, path: Path) -> OllamaModel | None:
    """None if the file is not a manifest."""
    try:
        layers = {
            str(layer["mediaType"]).removeprefix(_LAYER): (str(layer["digest"]), int(layer["size"]))
            for layer in json.loads(path.read_text(encoding="utf-8"))["layers"]
        }
    except (ValueError, LookupError, TypeError):
        return None
    blobs = {kind: (directory / "blobs" / digest.replace(":", "-")).resolve() for kind, (digest, _) in layers.items()}
    if "model" not in blobs:
        return None
    where = path.relative_to(manifests)
    name = f"{_short_name(where.parent.as_posix())}:{where.name}"
    try:
        parameters = json.loads(blobs["params"].read_text(encoding="utf-8")) if "params" in blobs else {}
    except (OSError, ValueError):
        parameters = {}
    others = tuple(kind for kind in ("template", "system", "adapter", "messages") if kind in layers)
    return OllamaModel(name, layers["model"][1], blobs["model"], parameters, blobs.get("projector"), others)


def _short_name(path: str) -> str:
    """As Ollama and its clients call the model."""
    registry, namespace = _NOT_IN_NAMES
    return path.removeprefix(registry).removeprefix(namespace) if path.startswith(registry) else path


def _carried(models: Iterator[OllamaModel]) -> CarriedOver:
    found = CarriedOver()
    for model in models:
        _add(model, found)
    if found.models:
        found.harnesses.add(LLAMA)
        found.note("", "vram_mb is a guess from the size of the file: correct it for long contexts")
    for table in found.models:
        name, _, tag = table["id"].rpartition(":")
        if tag == "latest":
            found.add_alias(name, table["id"])
    return found


def _add(model: OllamaModel, found: CarriedOver) -> None:
    name = model.name
    source = str(model.path) if model.path is not None else _hub_source(name)
    vram_mb = round(model.size_bytes / 2**20 * _EXTRA_SHARE) + _EXTRA_MB
    table: dict[str, Any] = {"id": name, "harness": LLAMA, "vram_mb": vram_mb}
    if source is None:
        found.note(
            name,
            "left out: `ollama list` does not say where its file is; import Ollama's directory of models instead, such "
            "as /usr/share/ollama/.ollama/models",
        )
        return
    table["source"] = source
    if model.path is not None:
        found.note("", "neuron must be able to read Ollama's files on each host: copy them, or mount them")
    parameters = dict(model.parameters)
    context = parameters.pop("num_ctx", None)
    if isinstance(context, int) and context > 0:
        table["max_model_len"] = context
    if model.projector is not None:
        table["args"] = ["--mmproj", str(model.projector)]
    gpus = [parameters.pop(key, None) for key in ("num_gpu", "main_gpu")]
    if any(value is not None for value in gpus):
        found.note(name, "num_gpu, main_gpu: left out; neuron chooses the GPUs")
    if parameters:
        texts = ", ".join(f"{key} = {json.dumps(value)}" for key, value in sorted(parameters.items()))
        found.note(name, f"parameters ({texts}): left out; make an alias with `default` for them")
    notes = {
        "system": "its system message is left out: clients send their own",
        "adapter": "its adapter is left out: give it as --lora in args",
        "messages": "its messages are left out: clients send their own",
    }
    for kind in model.others:
        if kind in notes:
            found.note(name, notes[kind])
    found.models.append(table)


def _hub_source(name: str) -> str | None:
    """The repository of a model that Ollama has from the hub, as llama.cpp names it."""
    prefix = next((each for each in _HUB if name.startswith(each)), None)
    return None if prefix is None else name.removeprefix(prefix).removesuffix(":latest")
