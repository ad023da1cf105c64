"""`[[harnesses]]` and `[harness.NAME]` of neuron.toml: the engines of a host and how they are started."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from shared.settings import SettingsModel

DEFAULT_PORT_RANGE = (20000, 20999)


def ordered_ports(value: tuple[int, int]) -> tuple[int, int]:
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

    _ports = field_validator("port_range")(ordered_ports)

    @property
    def described(self) -> bool:
        """True for an engine that is started from its description alone."""
        return self.kind is not None or self.preset is not None
