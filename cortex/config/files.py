"""Cortex's configuration files: read and checked together, and watched for changes."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ValidationError

from cortex.config.catalogue import Catalogue, load_catalogue
from cortex.config.gateway import GatewaySettings
from cortex.config.profile import ModelProfile
from cortex.config.settings import CortexConfig
from shared.protocol import first_problem
from shared.protocol.reserved_arguments import refused_argument
from shared.settings import SettingsError, load_settings
from shared.system.files import Stamp, stamp_of
from shared.tls import TlsError, certificate_warning, client_context, server_context

ENV_PREFIX = "CORTEX_"

KEYS_VARIABLE = "CORTEX_KEYS"
"""API keys; `cortex.accounts.keys` reads it."""

HARNESSES = ("vllm", "sim", "candle")
"""Kinds of engines that neurons have by themselves; the last one is that of helexa's. A neuron may describe others."""


class _CatalogueName(BaseModel):
    """The one key of cortex.toml that names another file; ignores everything else in it."""

    models_config: Path = Path("models.toml")


class ConfigurationFiles:
    """cortex.toml and the catalogue it names."""

    def __init__(self, path: Path, *, workers: int | None = None) -> None:
        """`workers` takes precedence over the file."""
        self.path = path
        self._workers = workers
        self._catalogue = path.parent / _CatalogueName().models_config
        self._read: tuple[Stamp, ...] | None = None

    @property
    def paths(self) -> tuple[Path, Path]:
        """cortex.toml and the catalogue it named when last read."""
        return self.path, self._catalogue

    def read(self) -> tuple[CortexConfig, Catalogue]:
        """Reads both files with environment and command-line overrides applied. Blocks.

        Raises:
            SettingsError: every problem in both files.
        """
        # Stamp before reading, so that a change during the read is noticed afterwards.
        self._read = self.stamps()
        named = _catalogue_named_in(self.path)
        if named is not None and named != self._catalogue:
            self._catalogue = named
            self._read = self.stamps()
        return self.look()

    def look(self) -> tuple[CortexConfig, Catalogue]:
        """As `read`, but the files still differ from what was read, so that a change of them is noticed later. Blocks.

        Raises:
            SettingsError: every problem in both files.
        """
        config, catalogue = read_configuration(self.path)
        return config if self._workers is None else with_workers(config, self._workers), catalogue

    def stamps(self) -> tuple[Stamp, ...]:
        """The current stamps of the files, following symbolic links. Blocks."""
        return tuple(stamp_of(path) for path in self.paths)

    def differ_from_what_was_read(self, stamps: tuple[Stamp, ...]) -> bool:
        """Whether the files differ from the versions last read."""
        return stamps != self._read


def read_configuration(path: Path) -> tuple[CortexConfig, Catalogue]:
    """cortex.toml with environment overrides, and the catalogue it names.

    Raises:
        SettingsError: every problem in both files.
    """
    problems: list[str] = []
    config: CortexConfig | None = None
    catalogue = Catalogue()
    try:
        config = load_settings(CortexConfig, path, env_prefix=ENV_PREFIX, environ=_settings(os.environ)).beside(path)
        models_path: Path | None = config.models_path(path)
    except SettingsError as error:
        problems += error.problems
        models_path = _catalogue_named_in(path)
    try:
        catalogue = load_catalogue(models_path) if models_path is not None else catalogue
    except SettingsError as error:
        problems += error.problems
    if problems or config is None:
        raise SettingsError(problems)
    return config, catalogue


def overriding_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the environment variables that override a key of cortex.toml."""
    names = (name for name in _settings(environ) if name.startswith(ENV_PREFIX))
    return sorted(n for n in names if n[len(ENV_PREFIX) :].lower().split("__")[0] in CortexConfig.model_fields)


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the variable that has API keys, which is not the table `[keys]`."""
    return {name: value for name, value in environ.items() if name != KEYS_VARIABLE}


def _catalogue_named_in(path: Path) -> Path | None:
    """The catalogue that a cortex.toml names, even one with mistakes, so that the catalogue's problems are reported
    too; None when it cannot be determined."""
    named = {name: value for name, value in os.environ.items() if name == f"{ENV_PREFIX}MODELS_CONFIG"}
    try:
        return path.parent / load_settings(_CatalogueName, path, env_prefix=ENV_PREFIX, environ=named).models_config
    except SettingsError:
        return None


def catalogue_problems(catalogue: Catalogue, path: Path) -> list[str]:
    """What a neuron of ours would refuse when it is asked to load the models of the catalogue `path`. Other neurons may
    have other rules, so a cortex serves such a catalogue."""
    problems = []
    for where, profile in _entries(catalogue, path):
        if profile.harness in HARNESSES:
            reason = refused_argument(profile.args)
            if reason is not None:
                problems.append(f"{where('args')}: {reason}")
    return list(dict.fromkeys(problems))


def _entries(catalogue: Catalogue, path: Path) -> Iterator[tuple[Callable[[str], str], ModelProfile]]:
    """Each model, or each of its variants, with a function that says where a key of it is set. Adapters have no keys
    that say how an engine runs."""
    for number, profile in enumerate(catalogue.models):
        if profile.base is not None:
            continue
        model = f"{path}: models[{number}]"
        for place, choice in enumerate(profile.choices):
            given = profile.variants[place].model_dump(exclude_none=True) if profile.variants else {}
            yield partial(_place_of, model, f"{model}.variants[{place}]", frozenset(given)), choice


def _place_of(model: str, variant: str, given: frozenset[str], key: str) -> str:
    return f"{variant if key in given else model}.{key}"


def configuration_warnings(config: CortexConfig, catalogue: Catalogue, path: Path) -> list[str]:
    """Settings that are valid but probably unintended."""
    names, finds = {entry.name for entry in config.neurons}, config.discovery.finds
    warnings = [] if names or finds else [f"{path}: neurons: empty, no model can be served"]
    for where, profile in _entries(catalogue, config.models_path(path)):
        close = difflib.get_close_matches(profile.harness, HARNESSES, n=1, cutoff=0.8)
        if close and profile.harness not in HARNESSES:
            warnings.append(
                f"{where('harness')} = {profile.harness!r}: {profile.id!r} can only be loaded by neurons that describe "
                f"this engine: did you mean {close[0]!r}?"
            )
        warnings += [
            f"{where('pinned_on')}: {profile.id!r} is pinned on {neuron!r}, which is not listed in {path}"
            for neuron in profile.pinned_on
            if neuron not in names and not finds
        ]
    return list(dict.fromkeys(warnings))


def tls_warnings(config: CortexConfig, path: Path) -> list[str]:
    """What is wrong with the dates of the certificates. Blocks.

    Raises:
        SettingsError: TLS files that cannot be used.
    """
    problems, warnings = [], []
    for table, files, make in (
        ("gateway", config.gateway.tls_files, server_context),
        ("neuron_tls", config.neuron_tls.files, client_context),
    ):
        if files is None or not files.paths:
            continue
        try:
            make(files)
            warning = certificate_warning(files)
        except TlsError as error:
            problems.append(f"{path}: {table}: {error}")
        else:
            warnings += [] if warning is None else [f"{path}: {table}: {warning}"]
    if problems:
        raise SettingsError(problems)
    return warnings


def with_workers(config: CortexConfig, workers: int) -> CortexConfig:
    """The configuration with this number of workers.

    Raises:
        SettingsError: the number is invalid.
    """
    try:
        gateway = GatewaySettings.model_validate({**config.gateway.model_dump(), "workers": workers})
    except ValidationError as error:
        raise SettingsError([f"--workers {workers}: {first_problem(error)[1]}"]) from error
    return config.model_copy(update={"gateway": gateway})


def state_directory(config: CortexConfig, path: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this cortex keeps its persistent state: `state_dir`, relative to the file; else systemd's directory;
    else one below the user's state directory, derived from the file's path so that two cortexes never share it.
    None, which keeps no state, for a file that is not on disk."""
    if config.state_dir is not None:
        return (path.parent / config.state_dir).absolute()
    lasting = path.resolve()
    if not lasting.is_file():  # an in-memory file or a pipe resolves to a path that does not exist
        return None
    given = environ.get("STATE_DIRECTORY")
    if given:
        return Path(given.partition(":")[0])
    try:
        below = Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:  # the user has no home directory
        return None
    return below / "cortex" / hashlib.sha256(os.fsencode(lasting)).hexdigest()[:12]
