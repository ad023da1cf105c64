"""neuron.toml."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from shared.cross_site import checked_hosts
from shared.protocol import FIRST_INSTANCE, LoadCommand
from shared.protocol.commands import WantedModel
from shared.protocol.parallel import ParallelSettings
from shared.settings import SettingsModel
from shared.tls import TlsFiles

DEFAULT_HARNESS = "vllm"
"""What a neuron offers without `[[harnesses]]`."""
DEFAULT_PORT_RANGE = (20000, 20999)
DEFAULT_GROUP_PORT_RANGE = (21000, 21999)
KeyMode = Literal["auto", "always", "never"]
"""`engine_keys`: see `neuron.engine.keys`."""


def _ordered_ports(value: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= value[0] <= value[1] <= 65535:
        raise ValueError("must be [first, last] with 1 <= first <= last <= 65535")
    return value


class HarnessEntry(SettingsModel):
    """A harness this host offers."""

    name: str


def _split(value: Any) -> Any:
    """A command line in one string as a list, split as a shell would."""
    try:
        return shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}") from error


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a valid regular expression: {error}") from error
    return value


def _url_path(value: str) -> str:
    if not value.startswith("/") or re.search(r"[\s#]", value):
        raise ValueError("must be a path that starts with /")
    return value


def _url_prefix(value: str) -> str:
    return _url_path(value).rstrip("/") if value else value


CommandLine = Annotated[list[str], BeforeValidator(_split)]
RegularExpression = Annotated[str, AfterValidator(_regular_expression)]
UrlPath = Annotated[str, AfterValidator(_url_path)]
MetricName = Annotated[str, Field(pattern=r"^[A-Za-z_:][A-Za-z0-9_:]*$")]


class ProgressPattern(SettingsModel):
    """`[[harness.NAME.progress]]`: a line of output that says how far a load is."""

    pattern: RegularExpression  # its group `percent`, if it has one, is how much of the phase is done
    phase: Literal["starting", "downloading", "loading weights", "compiling", "capturing graphs", "warming up"]


class ErrorPattern(SettingsModel):
    """`[[harness.NAME.errors]]`: a line of output that says why an engine ended."""

    pattern: RegularExpression
    cause: Literal["node", "model", "unknown"] = "unknown"
    permanent: bool = False  # True: another start on this host fails in the same way


class ActivitySettings(SettingsModel):
    """`[harness.NAME.activity]`: the metrics from which neuron reads an engine's requests."""

    path: UrlPath = "/metrics"
    running: MetricName  # a gauge
    waiting: MetricName | None = None  # a gauge
    ended: MetricName | None = None  # a counter
    progress: list[MetricName] = Field(
        default_factory=list
    )  # counters; with requests running and none rising, it hangs


class EngineDescription(SettingsModel):
    """What neuron has to know of an engine for which it has no code of its own. A preset has the same keys."""

    arguments: CommandLine = Field(default_factory=list)  # after `command`
    health_path: UrlPath = "/health"
    ready_pattern: RegularExpression | None = None  # no output matches: it is not ready yet
    api_prefix: Annotated[str, AfterValidator(_url_prefix)] = ""  # what its URLs have before `/v1`
    context_field: str = Field(default="max_model_len", min_length=1)  # where `/v1/models` has the context length
    paths: list[UrlPath] | None = None  # None: unknown
    missing_paths: list[UrlPath] = Field(default_factory=list)
    devices: str = Field(default="auto", pattern=r"^(auto|none|[A-Z_][A-Z0-9_]*)$")  # or a variable's name
    device_ids: Literal["uuid", "index"] = "uuid"
    memory: Literal["measured", "booked"] = "measured"
    stop_signal: Literal["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGKILL"] = "SIGTERM"
    keep_alive_secs: float | None = Field(default=None, ge=0)  # None: unknown
    progress: list[ProgressPattern] = Field(default_factory=list)
    errors: list[ErrorPattern] = Field(default_factory=list)
    activity: ActivitySettings | Literal["none"] = "none"
    python_package: str | None = Field(default=None, min_length=1)  # beside the executable: its version is the engine's
    version_arguments: CommandLine = Field(default_factory=list)  # with these the command prints its version and exits
    version_pattern: RegularExpression | None = None  # its group is the version; no match: the usual forms
    reserved_arguments: list[str] = Field(default_factory=list)  # no load command may have them
    context_arguments: list[str] = Field(default_factory=list)  # they set what `{context}` does
    code_arguments: list[str] = Field(default_factory=list)  # they make it run other code


class HarnessSettings(EngineDescription):
    """`[harness.NAME]`: how engines of this kind are started. The keys of an `EngineDescription` are only for those
    with `kind` or `preset`."""

    kind: Literal["command"] | None = None
    preset: str | None = None
    command: CommandLine | None = Field(default=None, min_length=1)  # None: the harness's own default
    port_range: tuple[int, int] = DEFAULT_PORT_RANGE  # first and last port
    extra_args: list[str] = Field(default_factory=list)  # appended to every command line
    startup_timeout_secs: float = Field(default=1800, gt=0)
    stall_timeout_secs: float = Field(default=600, ge=0)  # of a load that does nothing; 0: never ended for that
    stop_timeout_secs: float = Field(default=15, gt=0)  # from SIGTERM to SIGKILL
    env: dict[str, str] = Field(default_factory=dict)  # added to the engine's environment
    allow_code: bool = False  # True: load commands may have arguments that make the engine run other code
    sleep_mode: bool | Literal["dev"] | None = None  # None: the harness's own default
    spare: bool | Literal["auto"] = "auto"  # keep a process that has imported the engine's modules

    _ports = field_validator("port_range")(_ordered_ports)

    @property
    def described(self) -> bool:
        """True for an engine that is started from its description alone."""
        return self.kind is not None or self.preset is not None


class GroupSettings(SettingsModel):
    """`[group]`: how engines that span several hosts reach this one."""

    address: str | None = Field(default=None, min_length=1)  # None: the one at which cortex reaches neuron
    interface: str | None = Field(default=None, min_length=1)  # None: the one that has the address
    port_range: tuple[int, int] = DEFAULT_GROUP_PORT_RANGE  # where the parts of an engine meet, first and last
    env: dict[str, str] = Field(default_factory=dict)  # added to the environment of a part

    _ports = field_validator("port_range")(_ordered_ports)


class AcceleratorEntry(SettingsModel):
    """An entry of `[[accelerators]]`: equal devices of which neuron knows only what is written here."""

    name: str = Field(min_length=1)
    memory_mb: int = Field(gt=0)  # of each, for engines
    count: int = Field(default=1, ge=1, le=64)
    variable: str | None = Field(default=None, pattern=r"^[A-Z_][A-Z0-9_]*$")  # gets an engine's indices; None: nothing


class SimulatedDevice(SettingsModel):
    """A simulated device; missing values come from the preset `name`, if there is one, or for a MIG instance from its
    GPU."""

    index: int | None = Field(default=None, ge=0)  # optional; its position in the list, or that of a MIG instance
    kind: Literal["gpu", "mig"] = "gpu"
    parent: int | None = Field(default=None, ge=0)  # a MIG instance's GPU, by index
    profile: str | None = None  # of a MIG instance, such as "1g.10gb"
    vendor: Literal["nvidia", "amd", "unknown"] = "nvidia"
    name: str = "Simulated GPU"
    vram_total_mb: int | None = Field(default=None, gt=0)
    compute_capability: str | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    unified: bool | None = None  # True: it shares the host's RAM


class SimulateSettings(SettingsModel):
    """`[simulate]`: when present, it replaces the topology that NVML reports."""

    devices: list[str | SimulatedDevice] = Field(default_factory=list)
    nvlink: bool = False  # True: all devices are NVLink peers; False: they share a PCIe host bridge
    ram_mb: int | None = Field(default=None, gt=0)  # of the host; None: not counted
    cores: int | None = Field(default=None, ge=1, le=4096)  # None: those of this machine


class SleepSettings(SettingsModel):
    """`[sleep]`: limits on the host memory of engines, sleeping ones included."""

    ram_reserve_mb: int | None = Field(default=None, ge=0)  # for other programs; None: 4096, at most an eighth


class HealthSettings(SettingsModel):
    """`[health]`: how loaded engines are watched. All in seconds."""

    interval_secs: float = Field(default=0.5, gt=0)
    unresponsive_secs: float = Field(default=30, gt=0)  # a busy API server may take seconds to answer
    hang_grace_secs: float = Field(default=120, gt=0)
    prefill_grace_secs: float = Field(default=900, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> HealthSettings:
        if self.prefill_grace_secs < self.hang_grace_secs:
            least = f"hang_grace_secs, which is {self.hang_grace_secs:g}"
            raise ValueError(f"prefill_grace_secs: {self.prefill_grace_secs:g} is less than {least}")
        return self


class RecoverySettings(SettingsModel):
    """`[recovery]`: what happens when an engine dies without being stopped."""

    max_failures: int = Field(default=5, ge=1)  # in a row; then the model is `failed` until it is loaded again
    backoff_secs: float = Field(default=10, ge=0)  # before the second restart, then doubled; the first is immediate
    max_backoff_secs: float = Field(default=300, ge=0)
    stable_secs: float = Field(default=300, ge=0)  # after serving this long, an engine's failures are forgotten


class DefaultModel(WantedModel):
    """An entry of `[[default_models]]`: a load command in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")

    parallel: ParallelSettings | None = None


class NeuronConfig(SettingsModel):
    """neuron.toml. Load it as `neuron.harness.checks.CheckedConfig`, which knows the harnesses."""

    name: str | None = None  # None: the host's name
    host: str = "127.0.0.1"
    port: int = Field(default=13131, ge=0, le=65535)
    token: str | None = Field(default=None, min_length=1)
    token_env: str | None = None
    tls_cert: Path | None = None  # PEM, with its chain; relative to neuron.toml
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # PEM: callers need a certificate that one of these authorities has signed
    allow_anonymous: bool = False  # True: it may listen on the network without a token
    allowed_hosts: list[str] = Field(default_factory=list)  # public names that callers without a token may use
    engine_keys: KeyMode = "auto"  # which engines get a key
    state_dir: Path | None = None  # None: a directory of this user and port below the system's temporary directory
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    drain_timeout_secs: float = Field(default=30, ge=0)
    on_stop: Literal["stop_engines", "leave_engines"] = "stop_engines"  # the next neuron adopts engines that are left
    recovery: RecoverySettings = Field(default_factory=RecoverySettings)
    harness: Mapping[str, HarnessSettings] = Field(default_factory=dict)
    harnesses: list[HarnessEntry] | None = None  # None: see `harness_names`
    group: GroupSettings = Field(default_factory=GroupSettings)
    health: HealthSettings = Field(default_factory=HealthSettings)
    sleep: SleepSettings = Field(default_factory=SleepSettings)
    accelerators: list[AcceleratorEntry] = Field(default_factory=list)  # not empty: no driver is asked
    simulate: SimulateSettings | None = None
    model_roots: list[Path] = Field(default_factory=list)  # not empty: local models must be below one of these
    default_models: list[DefaultModel] = Field(default_factory=list)

    _hosts = field_validator("allowed_hosts")(checked_hosts)

    @model_validator(mode="after")
    def _consistent(self) -> NeuronConfig:
        names = self.harness_names
        if len(set(names)) != len(names):
            raise ValueError("harnesses: duplicate harness")
        for model in self.default_models:
            if model.harness is not None and model.harness not in names:
                raise ValueError(
                    f"default_models: {model.model_id}: harness {model.harness!r} is not offered (offered: "
                    f"{', '.join(names) or 'none'})"
                )
        loads = [(model.model_id, model.instance or FIRST_INSTANCE) for model in self.default_models]
        for model_id, instance in loads:
            if loads.count((model_id, instance)) > 1:
                raise ValueError(
                    f"default_models: {model_id}: listed twice with instance {instance!r}: give each entry an instance "
                    "of its own"
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: set both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key")
        if len({entry.variable for entry in self.accelerators}) > 1:
            raise ValueError("accelerators: all entries must have the same variable: indices count over all of them")
        for root in self.model_roots:
            if not root.is_absolute():
                raise ValueError(f"model_roots: {str(root)!r} is not an absolute path")
        if self.token is None and self.token_env is not None and not os.environ.get(self.token_env):
            raise ValueError(f"token_env: the environment variable {self.token_env} is not set")
        return self

    @property
    def harness_names(self) -> list[str]:
        """What this host offers, the default first: `[[harnesses]]`, then every engine that a table describes. Without
        `[[harnesses]]` every table, if one of them describes an engine, else vLLM."""
        described = [name for name, table in self.harness.items() if table.described]
        if self.harnesses is None:
            return list(self.harness) if described else [DEFAULT_HARNESS]
        listed = [entry.name for entry in self.harnesses]
        return [*listed, *(name for name in described if name not in listed)]

    def harness_settings(self, name: str) -> HarnessSettings:
        return self.harness.get(name) or HarnessSettings()

    @property
    def binds_all_addresses(self) -> bool:
        """True when `host` is a wildcard: callers then reach engines at the address where they reach neuron."""
        return self.host in ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound

    @property
    def default_commands(self) -> list[LoadCommand]:
        """`default_models` with the harness filled in: a bare model id would ask for its remembered spec."""
        first = next(iter(self.harness_names), None)
        given = (model.model_dump(exclude_unset=True) for model in self.default_models)
        return [LoadCommand.model_validate({"harness": first, **each}) for each in given]

    @property
    def tls_files(self) -> TlsFiles | None:
        """What callers see of this neuron, and what they must show; None for HTTP without TLS."""
        return None if self.tls_cert is None else TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def bearer_token(self) -> str | None:
        """The token that callers must send; None when none is configured."""
        return self.token or (os.environ[self.token_env] if self.token_env else None)

    def state_directory(self, port: int) -> Path:
        """Where this neuron keeps its engines' directories; `port` is the one it actually listens on."""
        default = Path(tempfile.gettempdir()) / f"neuron-{os.getuid()}-{port}"
        path = (self.state_dir or default).absolute()
        # Engines are recognised by this path after a restart, so it must not depend on how it is written. Its last part
        # is not resolved: a symbolic link there is refused.
        return path.parent.resolve() / path.name
