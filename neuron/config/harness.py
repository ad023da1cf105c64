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
    """`vllm`, `sim` for simulated engines, or the NAME of an engine that `[harness.NAME]` describes."""


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

    pattern: RegularExpression
    r"""A regular expression. Its group `percent`, if it has one, is how much of the phase is done:
    `(?P<percent>\d+)%`."""
    phase: Literal["starting", "downloading", "loading weights", "compiling", "capturing graphs", "warming up"]
    """`"starting"`, `"downloading"`, `"loading weights"`, `"compiling"`, `"capturing graphs"` or `"warming up"`."""


class ErrorPattern(SettingsModel):
    """`[[harness.NAME.errors]]`: a line of output that says why an engine ended."""

    pattern: RegularExpression
    """A regular expression."""
    cause: Literal["node", "model", "unknown"] = "unknown"
    """Who is at fault: `"node"` (another host may do), `"model"` (no host will) or `"unknown"`."""
    permanent: bool = False
    """`true`: another start on this host would fail in the same way."""


class ActivitySettings(SettingsModel):
    """`[harness.NAME.activity]`: the metrics from which neuron reads an engine's requests."""

    path: UrlPath = "/metrics"
    """Path of the metrics."""
    running: MetricName
    """Gauge: requests that it works on."""
    waiting: MetricName | None = None
    """Gauge: requests that wait. Default: none."""
    ended: MetricName | None = None
    """Counter: requests that have ended. Default: none."""
    progress: list[MetricName] = Field(default_factory=list)
    """Counters that rise while it works. If none does for `[health] prefill_grace_secs` while requests run, it hangs.
    Default: none."""


class EngineDescription(SettingsModel):
    """What neuron has to know of an engine for which it has no code of its own. A preset has the same keys."""

    arguments: CommandLine = Field(default_factory=list)
    """The arguments after `command`; the model's `args` and `extra_args` follow. Default: none."""
    health_path: UrlPath = "/health"
    """Answers 200 as soon as the engine serves, and as long as it does."""
    ready_pattern: RegularExpression | None = None
    """A regular expression: the engine is not ready before a line of its output matches. Default: none: its health
    decides."""
    api_prefix: Annotated[str, AfterValidator(_url_prefix)] = ""
    """What the URLs of its API have before `/v1`."""
    context_field: str = Field(default="max_model_len", min_length=1)
    """Where an entry of its `/v1/models` has the context length that it serves, with dots between nested keys."""
    paths: list[UrlPath] | None = None
    """All paths that it serves, such as `["/v1/embeddings"]`: cortex refuses others before it loads the model. Default:
    unknown."""
    missing_paths: list[UrlPath] = Field(default_factory=list)
    """Which of `/v1/messages`, `/v1/messages/count_tokens` and `/v1/responses` it lacks: cortex translates them.
    Default: none; with `paths` those not listed."""
    devices: str = Field(default="auto", pattern=r"^(auto|none|[A-Z_][A-Z0-9_]*)$")
    """How it learns its GPUs: the name of the variable that gets them, `"auto"` for `CUDA_VISIBLE_DEVICES` (on AMD's
    GPUs `HIP_VISIBLE_DEVICES`), or `"none"` for no variable."""
    device_ids: Literal["uuid", "index"] = "uuid"
    """How GPUs are named to it: `"uuid"` or `"index"`."""
    memory: Literal["measured", "booked"] = "measured"
    """What stays booked once it serves: `"measured"`, what it holds; or `"booked"`, the model's `vram_mb`, for an
    engine that allocates more while it works."""
    stop_signal: Literal["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGKILL"] = "SIGTERM"
    """Asks it to stop: `SIGTERM`, `SIGINT`, `SIGQUIT`, `SIGHUP` or `SIGKILL`."""
    keep_alive_secs: float | None = Field(default=None, ge=0)
    """How long it keeps an idle connection open. Default: unknown: cortex reuses one for 3 s."""
    progress: list[ProgressPattern] = Field(default_factory=list)
    errors: list[ErrorPattern] = Field(default_factory=list)
    activity: ActivitySettings | Literal["none"] = "none"
    python_package: str | None = Field(default=None, min_length=1)
    """The Python package whose version is the engine's; neuron looks for it beside the executable. Default: none."""
    version_arguments: CommandLine = Field(default_factory=list)
    """With these after `command` it prints its version and exits, such as `["--version"]`; not used with placeholders
    in `command`. Default: none: its version is unknown."""
    version_pattern: RegularExpression | None = None
    """A regular expression whose group is the version in what it prints. Default: none, and without a match: `version:
    1.2`, `1.2` and the like."""
    reserved_arguments: list[str] = Field(default_factory=list)
    """Flags that a load's `args` must not have; `"--ssl-*"` stands for all that begin so. Default: none."""
    context_arguments: list[str] = Field(default_factory=list)
    """Flags that set the context length, such as `["-c", "--ctx-size"]`: a load with `max_model_len` must not have them
    in its `args` too. Default: none."""
    code_arguments: list[str] = Field(default_factory=list)
    """Flags that make it run code: refused in a load's `args` without `allow_code`. Default: none."""


class HarnessSettings(EngineDescription):
    """`[harness.NAME]`: how engines of this kind are started. The keys from `arguments` on are only for
    those with `kind` or `preset`."""

    kind: Literal["command"] | None = None
    """`"command"`: this table describes the engine. Default: `vllm` and `sim` have code of their own."""
    preset: str | None = None
    """A description that comes with neuron: `"llama.cpp"`, `"llama-cpp-python"`, `"sglang"`, `"infinity"` or
    `"speaches"`; keys of the table override it. Default: none."""
    command: CommandLine | None = Field(default=None, min_length=1)
    """Executable and first arguments: a list, or one string that is split as a shell would. It may live in another
    virtual environment. Default: `["vllm"]` from PATH; for `sim` this Python; with `kind` it is required."""
    port_range: tuple[int, int] = DEFAULT_PORT_RANGE
    """First and last port for engines."""
    extra_args: list[str] = Field(default_factory=list)
    """Appended to every command line, after a model's `args`. Arguments that neuron sets itself are refused. Default:
    none."""
    startup_timeout_secs: float = Field(default=1800, gt=0)
    """Time from an engine's start to its first successful health check; then the load has failed."""
    stall_timeout_secs: float = Field(default=600, ge=0)
    """A load without output, CPU time and I/O of any of its processes is ended after this time (answers to neuron's
    health checks, and lines about them that contain `GET`, `health_path` and a space, do not count); its progress says
    so after a fifth of it, at most 120 s. 0: never ended. Not for the parts of an engine that [spans
    hosts](spanning.md). Use 0 for an engine in a container that a client such as `docker run` starts: neuron does not
    see its processes."""
    stop_timeout_secs: float = Field(default=15, gt=0)
    """Time from SIGTERM to SIGKILL when an engine is stopped."""
    env: dict[str, str] = Field(default_factory=dict)
    """Added to the engine's environment. Default: nothing."""
    allow_code: bool = False
    """`true`: a load's `args` may contain arguments that run code, such as `--trust-remote-code`
    ([security.md](security.md#which-arguments-run-code))."""
    sleep_mode: bool | Literal["dev"] | None = None
    """Whether engines can sleep, see [sleep](configuration.md#sleep): `true`, `false`, or `"dev"`. Default: off for
    `vllm`, on for `sim`."""
    spare: bool | Literal["auto"] = "auto"
    """Whether neuron keeps a process that has imported the engine's modules, see [spare](configuration.md#spare):
    `true`, `false`, or `"auto"`."""

    _ports = field_validator("port_range")(ordered_ports)

    @property
    def described(self) -> bool:
        """True for an engine that is started from its description alone."""
        return self.kind is not None or self.preset is not None
