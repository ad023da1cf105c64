"""cortex.toml."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from cortex.config.discovery import DiscoverySettings
from cortex.config.gateway import GatewaySettings
from cortex.config.neurons import HostNetwork, NeuronEntry, NeuronTlsSettings
from cortex.config.sign_in import AuthSettings
from cortex.http.headers import OF_REQUESTS, PASS
from shared.settings import SettingsModel

_HOST = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]*)(:[0-9]*)?")


class KeysSettings(SettingsModel):
    """`[keys]`: API keys that are provisioned from outside."""

    file: Path | None = None
    """TOML file with [API keys](keys.md#how-do-i-provision-keys-from-a-file-or-the-environment), relative to
    cortex.toml. Default: none."""


class PollSettings(SettingsModel):
    """`[poll]`: how neurons are polled."""

    interval_secs: float = Field(default=2.0, gt=0)
    """Seconds between two polls of a neuron. Neurons with `/events` push changes within milliseconds, so cortex then
    polls only `/health`, and everything every 15th time. For protocol v1 neurons this is the delay until cortex sees a
    change."""
    timeout_secs: float = Field(default=5.0, gt=0)
    """How long one poll may take."""
    unhealthy_after: int = Field(default=3, ge=1)
    """Consecutive missed polls after which a neuron gets no requests; one answer makes it healthy again."""


class ColdLoadSettings(SettingsModel):
    """`[cold_load]`: loading a model on request."""

    timeout_secs: float = Field(default=1800, gt=0)
    """How long a load may take, and how long a request waits for it."""


@dataclass(frozen=True)
class Rules:
    """The `[placement]` settings, as the planner uses them. Times in seconds."""

    min_residency_secs: float = 15.0
    """A model stays loaded at least this long, unless no other eviction frees enough memory."""
    patience_secs: float = 300.0
    """After this wait, or sooner when that means less waiting (see `cortex.placement.eviction`), a busy model that has
    had its minimum residency is drained and evicted."""
    starvation_secs: float = 300.0
    """After this wait a model goes first, whatever the priorities."""
    pause_secs: float = 10.0
    """Upper limit of the time after its last request during which a model still counts as in use."""
    replica_target: int = 8
    """Requests per replica above which another replica is worth a load."""
    scale_up_secs: float = 5.0
    """The requests must exceed the target for this long."""
    scale_down_secs: float = 300.0
    """A replica beyond the minimum is removed after this long without a request."""
    load_ahead: bool = True
    """Whether a model that was evicted for another comes back before it is requested, when that means less waiting."""


class PlacementSettings(SettingsModel):
    """`[placement]`: which model is evicted for which, and when. Times in seconds."""

    min_residency_secs: float = Field(default=Rules.min_residency_secs, ge=0)
    """A freshly loaded model stays at least this long unless nothing else frees the memory; models.toml can set it per
    model."""
    patience_secs: float = Field(default=Rules.patience_secs, ge=0)
    """Once requests have waited as long as [evicting a busy model will cost its
    own](placement.md#which-models-are-evicted), or one of them this long, it may be evicted, after its residency: it
    gets no new requests and finishes those it has."""
    starvation_secs: float = Field(default=Rules.starvation_secs, ge=0)
    """A request that has waited this long goes first, whatever the priorities of the others; at least
    `patience_secs`."""
    pause_secs: float = Field(default=Rules.pause_secs, ge=0)
    """A model counts as busy after its last request for a twentieth of what an exchange takes, and at most this
    long."""
    replica_target: int = Field(default=Rules.replica_target, ge=1)
    """Running and waiting requests per replica above which another replica is loaded, if the model's `replicas.max`
    allows it."""
    scale_up_secs: float = Field(default=Rules.scale_up_secs, ge=0)
    """The load must exceed `replica_target` for this long."""
    scale_down_secs: float = Field(default=Rules.scale_down_secs, gt=0)
    """A replica beyond `replicas.min` is unloaded after this long without a request."""
    load_ahead: bool = Rules.load_ahead
    """Whether a model that was evicted for another [comes back before it is
    requested](placement.md#when-does-a-model-come-back-before-it-is-requested), when it is used more than what is idle
    then."""
    fairness_half_life_secs: float = Field(default=900.0, ge=0, allow_inf_nan=False)
    """[the device time that API keys have used](fairness.md) fades to half within this time; `0`: it does not decide
    whose model is loaded."""

    def rules(self) -> Rules:
        """These settings as rules for the planner."""
        rules = Rules(**self.model_dump(exclude={"fairness_half_life_secs"}))
        # Memory is not reserved for a model before busy models may be drained for it.
        return replace(rules, starvation_secs=max(rules.starvation_secs, rules.patience_secs))


class RoutingSettings(SettingsModel):
    """`[routing]`: which of several replicas gets a request."""

    session_header: str = Field(default="x-session-id", pattern=r"^[A-Za-z0-9-]*$")
    """Requests with the same value in this header go to the same engine, whatever their prompts; the header is
    forwarded. `""` turns it off. Names that cortex itself reads (`authorization`, `x-request-id`, …) are refused."""
    prefix_chars: int = Field(default=256, ge=0, le=65536)
    """Without that header, requests whose prompts share this many first characters go to the same engine, for its
    prefix cache; 0 to 65536, 0 ignores prompts."""
    load_factor: float = Field(default=1.25, ge=1, le=100)
    """How far above the average load an engine may be and still be preferred for that, 1 to 100; beyond it the next
    engine gets the request."""

    @field_validator("session_header")
    @classmethod
    def _goes_on_to_the_engine(cls, value: str) -> str:
        if OF_REQUESTS[value.encode() + b":"][0] != PASS:
            raise ValueError("reserved by cortex: choose another name")
        return value


class WaitingSettings(SettingsModel):
    """`[waiting]`: limits on requests that wait for a model, and how often they get progress comments."""

    per_model: int = Field(default=1024, ge=1)
    """Requests that may wait for one model."""
    total: int = Field(default=4096, ge=1)
    """Requests that may wait in total."""
    first_comment_secs: float = Field(default=1.0, gt=0)
    """An event stream that has waited this long is answered with 200 and a first comment, see
    [api.md](api.md#what-does-a-stream-get-while-it-waits)."""
    comment_interval_secs: float = Field(default=2.0, gt=0)
    """Time between two comments of one stream."""
    plain_keepalive: Literal["off", "whitespace"] = "off"
    """`"whitespace"`: a plain JSON answer begins early as well, at a price, see
    [api.md](api.md#what-does-a-plain-request-get-while-it-waits)."""


class UsageSettings(SettingsModel):
    """`[usage]`: the records of what was used."""

    currency: str = Field(default="EUR", pattern=r"^[A-Z]{3}$")
    """ISO 4217 code of the currency of the catalogue's [prices](configuration.md#modelsprices). A reload is refused
    while a key has a [budget](limits.md) in another currency."""
    retention_days: int = Field(default=400, ge=0)
    """Records of requests are deleted after so many days; `0`: never."""
    daily_retention_days: int = Field(default=3650, ge=0)
    """Their daily sums are deleted after so many days, but not before the records; `0`: never."""


class EnergySettings(SettingsModel):
    """`[energy]`: what the GPUs' energy costs."""

    price_per_kwh: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Price of a kWh, in `[usage] currency`, for usage reports."""


class TracingSettings(SettingsModel):
    """`[tracing]`: OpenTelemetry traces of requests."""

    endpoint: str | None = None
    """Base URL of an OTLP/HTTP collector, such as `http://127.0.0.1:4318`; [spans](tracing.md) go to `/v1/traces`
    there. Needs the packages of `cortex-neuron[tracing]`. Default: no traces."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Which part of the requests is traced, 0 to 1; a request with a `traceparent` is traced if its client says so."""

    @field_validator("endpoint")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("must be a URL such as http://127.0.0.1:4318")
        if not _has_opentelemetry():
            raise ValueError("needs OpenTelemetry: run `pip install 'cortex-neuron[tracing]'`")
        return value.rstrip("/")


class CortexConfig(SettingsModel):
    """The whole of cortex.toml."""

    models_config: Path = Path("models.toml")
    """Path of the catalogue, relative to cortex.toml. Default: `"models.toml"`."""
    state_dir: Path | None = None
    """Directory for state that survives restarts (drained neurons, models held back, load times, context lengths,
    makers of responses), relative to cortex.toml; used by one cortex at a time. Default: systemd's `STATE_DIRECTORY`;
    otherwise a directory under `$XDG_STATE_HOME/cortex` (`~/.local/state/cortex`) that belongs to this cortex.toml,
    created when needed."""
    database: str | None = None
    """`postgresql://USER:PASSWORD@HOST/NAME`, for several cortexes that share keys, limits and usage. libpq's
    parameters work: `?host=/run/postgresql`, `?sslmode=verify-full`. In the user and the password write `/` as `%2F`,
    `#` as `%23`, `?` as `%3F` and `@` as `%40`. Default: SQLite in `cortex.db` in the state
    directory."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """`debug`, `info`, `warning` or `error`; the log goes to standard error. Libraries log nothing below `info`."""
    log_format: Literal["text", "json"] = "text"
    """`text`, or `json`: one object a line with `time` (ISO 8601, UTC), `level`, `logger`, `message`, `request_id` and
    `exception`."""
    gateway: GatewaySettings = GatewaySettings()
    keys: KeysSettings = KeysSettings()
    auth: AuthSettings = AuthSettings()
    poll: PollSettings = PollSettings()
    cold_load: ColdLoadSettings = ColdLoadSettings()
    placement: PlacementSettings = PlacementSettings()
    routing: RoutingSettings = RoutingSettings()
    waiting: WaitingSettings = WaitingSettings()
    usage: UsageSettings = UsageSettings()
    energy: EnergySettings = EnergySettings()
    tracing: TracingSettings = TracingSettings()
    neuron_tls: NeuronTlsSettings = NeuronTlsSettings()
    discovery: DiscoverySettings = DiscoverySettings()
    neurons: list[NeuronEntry] = Field(default_factory=list)

    @field_validator("database")
    @classmethod
    def _database_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("postgresql://", "postgres://")):
            raise ValueError("must be a URL such as postgresql://user:password@host/name")
        if value is not None and not _is_unambiguous(value):
            raise ValueError(
                "cannot be read as postgresql://user:password@host:port/name: in the user and the password write "
                "/ as %2F, # as %23, ? as %3F and @ as %40"
            )
        return value

    @field_validator("neurons")
    @classmethod
    def _distinct(cls, value: list[NeuronEntry]) -> list[NeuronEntry]:
        names = [entry.name for entry in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"duplicate neuron name {twice[0]!r}")
        return value

    def networks(self) -> dict[str, HostNetwork]:
        """By neuron; without those for which nothing is configured."""
        every = {entry.name: HostNetwork(entry.network, entry.network_gbps) for entry in self.neurons}
        return {name: network for name, network in every.items() if network != HostNetwork()}

    def beside(self, config_file: Path) -> CortexConfig:
        """With absolute paths for TLS files and the client's secret, which are relative to the file that names them."""

        def found(table: SettingsModel, *keys: str) -> SettingsModel:
            paths = {key: getattr(table, key) for key in keys}
            directory = config_file.parent.absolute()
            return table.model_copy(update={key: directory / path for key, path in paths.items() if path is not None})

        tables = {
            "gateway": found(self.gateway, "tls_cert", "tls_key"),
            "neuron_tls": found(self.neuron_tls, "ca", "cert", "key"),
            "discovery": found(self.discovery, "registration_token_file"),
            "auth": self.auth.model_copy(update={"oidc": found(self.auth.oidc, "client_secret_file")}),
        }
        return self.model_copy(update=tables)

    def keys_path(self, config_file: Path) -> Path | None:
        """The file of keys, relative to the file that names it."""
        return None if self.keys.file is None else config_file.parent / self.keys.file

    def models_path(self, config_file: Path) -> Path:
        """The catalogue's path, relative to the file that names it."""
        return config_file.parent / self.models_config


def _has_opentelemetry() -> bool:
    """Whether the packages of `cortex-neuron[tracing]` are installed."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def _is_unambiguous(url: str) -> bool:
    """Whether PostgreSQL's URL has its password where one looks for it. With an unescaped `/` in it, for example, a
    part of the password would be taken for the host's port or the database's name, and shown in messages."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are not of an address
        return False
    _, _, address = parts.netloc.rpartition("@")
    hosts = address.split(",") if address else []
    return url.count("@") == parts.netloc.count("@") <= 1 and all(host and _HOST.fullmatch(host) for host in hosts)
