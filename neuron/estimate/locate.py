"""Finds a model's files on this host. Blocks; reads the disk only, never the network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from neuron.estimate.files.architecture import architecture_of
from neuron.estimate.files.fields import Fields, ModelFilesInvalid, files_not_found
from neuron.estimate.files.safetensors_header import read_json
from neuron.estimate.files.stored import stored_weights
from neuron.estimate.weights import ModelFiles

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 << 20
_Stamp = tuple[tuple[str, int, int], ...]


def model_at(source: str, environ: Mapping[str, str], *, revision: str | None, download_dir: str | None) -> ModelFiles:
    """The model that an engine would load for `source`: a directory, or a name in the hub's local cache.

    `environ` is the engine's. The result is cached while the files' times and sizes stay the same.

    Raises:
        NotFound: `model_files_not_found`, the files are not on this host.
        ModelFilesInvalid: they are broken.
    """
    directory = directory_of(source, environ, revision=revision, download_dir=download_dir)
    try:
        stamp = _stamp(directory)
    except OSError as error:
        raise ModelFilesInvalid(f"{directory} cannot be read: {error.strerror or error}") from error
    return _read(source, directory, stamp)


def directory_of(source: str, environ: Mapping[str, str], *, revision: str | None, download_dir: str | None) -> Path:
    """The directory with the model's config.json.

    Raises:
        NotFound: it does not exist.
    """
    path = Path(source)
    try:
        if path.is_dir():
            if not (path / CONFIG).is_file():
                raise files_not_found(source, f"the directory has no {CONFIG}")
            return path
        exists = path.exists()
    except OSError as error:  # no permission, or too long for a path and for a name of the hub
        raise files_not_found(source, error.strerror or str(error)) from error
    if path.is_absolute() or exists:
        raise files_not_found(source, "it is a file, not a directory" if exists else "there is no such directory")
    cache = _expanded(download_dir) if download_dir else hub_cache(environ)
    return _in_hub_cache(source, cache, revision)


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The hub's cache as a process with this environment finds it."""
    for variable, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if environ.get(variable):
            return _expanded(environ[variable]) / below
    return _expanded(environ.get("HOME") or "~") / ".cache" / "huggingface" / "hub"


def _expanded(path: str) -> Path:
    """With the home directory for `~`; unchanged without one, as in most programs."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for such a user


def _in_hub_cache(name: str, cache: Path, revision: str | None) -> Path:
    # Imported here because it takes a quarter of a second.
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    try:
        found = try_to_load_from_cache(name, CONFIG, cache_dir=cache, revision=revision)
    except (ValueError, OSError) as error:  # an invalid name, or an unreadable cache
        raise files_not_found(name, str(error)) from error
    if not isinstance(found, str):
        of_revision = "" if revision is None else f" of revision {revision}"
        raise files_not_found(name, f"no {CONFIG}{of_revision} in the hub's cache {cache}")
    return Path(found).parent


def _stamp(directory: Path) -> _Stamp:
    with os.scandir(directory) as entries:
        wanted = [entry.path for entry in entries if entry.name.endswith((".json", ".safetensors"))]
    found = []
    for path in wanted:
        try:
            status = os.stat(path)  # noqa: PTH116 - follows the cache's links into its blobs
        except OSError:  # a link whose file was not downloaded: reading the index reports it
            continue
        found.append((path, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


@lru_cache(maxsize=64)
def _read(source: str, directory: Path, _: _Stamp) -> ModelFiles:
    path = directory / CONFIG
    config = Fields(read_json(path, max_bytes=_MAX_CONFIG_BYTES), str(path))
    architecture = architecture_of(config)
    return ModelFiles(source, architecture, stored_weights(directory, architecture))
