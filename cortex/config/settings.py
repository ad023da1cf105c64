"""cortex.toml."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cortex.config.sign_in import AuthSettings
from cortex.http.headers import OF_REQUESTS, PASS
from shared.cross_site import checked_hosts, checked_origins
from shared.settings import SettingsModel
from shared.tls import TlsFiles

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def parse_listen(value: str) -> tuple[str, int]:
    """Splits `host:port` or `[v6]:port`.

    Raises:
        ValueError: the value is neither.
    """
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be HOST:PORT, for example 127.0.0.1:31313")
    return host.removeprefix("[").removesuffix("]"), int(port)


class GatewaySettings(SettingsModel):
    """`[gateway]`: the HTTP server."""

    listen: str = "127.0.0.1:31313"
    metrics_listen: str = "127.0.0.1:31314"
    workers: int = Field(default=1, ge=1, le=256)
    max_body_mib: int = Field(default=32, ge=1, le=4096)
    drain_timeout_secs: float = Field(default=30, ge=0)
    keepalive_secs: float = Field(default=15, gt=0)
    default_model: str | None = Field(default=None, min_length=1)  # id or alias, for requests that name no model
    allowed_origins: list[str] = Field(default_factory=list)  # of web pages; cortex's own is always allowed
    allowed_hosts: list[str] = Field(default_factory=list)  # public names that clients reach cortex under
    allow_anonymous: bool = False  # True: clients need no key, but those with one go first
    metrics_token: str | None = Field(default=None, min_length=1)
    metrics_token_env: str | None = None
    tls_cert: Path | None = None  # PEM, with its chain; relative to cortex.toml
    tls_key: Path | None = None

    _origins = field_validator("allowed_origins")(checked_origins)
    _hosts = field_validator("allowed_hosts")(checked_hosts)

    @model_validator(mode="after")
    def _metrics_token_is_there(self) -> GatewaySettings:
        if self.metrics_token is None and self.metrics_token_env and not os.environ.get(self.metrics_token_env):
            raise ValueError(f"metrics_token_env: the environment variable {self.metrics_token_env} is not set")
        return self

    @property
    def metrics_bearer_token(self) -> str | None:
        """What Prometheus has to send; None if it needs none."""
        return self.metrics_token or (os.environ[self.metrics_token_env] if self.metrics_token_env else None)

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _address(cls, value: str) -> str:
        parse_listen(value)
        return value

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> GatewaySettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: set both, or neither")
        return self

    @property
    def tls_files(self) -> TlsFiles | None:
        """What clients see of this server; None for HTTP without TLS."""
        return None if self.tls_cert is None else TlsFiles(self.tls_cert, self.tls_key)

    def url(self, host: str, port: int) -> str:
        """Where clients reach cortex when it listens on this address."""
        return f"{'http' if self.tls_cert is None else 'https'}://{host}:{port}"


class KeysSettings(SettingsModel):
    """`[keys]`: API keys that are provisioned from outside."""

    file: Path | None = None  # TOML with [[keys]], relative to cortex.toml


class PollSettings(SettingsModel):
    """`[poll]`: how neurons are polled."""

    interval_secs: float = Field(default=2.0, gt=0)
    timeout_secs: float = Field(default=5.0, gt=0)
    unhealthy_after: int = Field(default=3, ge=1)  # consecutive misses


class ColdLoadSettings(SettingsModel):
    """`[cold_load]`: loading a model on request."""

    timeout_secs: float = Field(default=1800, gt=0)


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
    patience_secs: float = Field(default=Rules.patience_secs, ge=0)
    starvation_secs: float = Field(default=Rules.starvation_secs, ge=0)
    pause_secs: float = Field(default=Rules.pause_secs, ge=0)
    replica_target: int = Field(default=Rules.replica_target, ge=1)  # requests at a time
    scale_up_secs: float = Field(default=Rules.scale_up_secs, ge=0)
    scale_down_secs: float = Field(default=Rules.scale_down_secs, gt=0)
    load_ahead: bool = Rules.load_ahead
    fairness_half_life_secs: float = Field(default=900.0, ge=0, allow_inf_nan=False)  # 0: keys have no device time

    def rules(self) -> Rules:
        """These settings as rules for the planner."""
        rules = Rules(**self.model_dump(exclude={"fairness_half_life_secs"}))
        # Memory is not reserved for a model before busy models may be drained for it.
        return replace(rules, starvation_secs=max(rules.starvation_secs, rules.patience_secs))


class RoutingSettings(SettingsModel):
    """`[routing]`: which of several replicas gets a request."""

    session_header: str = Field(default="x-session-id", pattern=r"^[A-Za-z0-9-]*$")  # empty: none
    prefix_chars: int = Field(default=256, ge=0, le=65536)  # 0: prompts are ignored
    load_factor: float = Field(default=1.25, ge=1, le=100)

    @field_validator("session_header")
    @classmethod
    def _goes_on_to_the_engine(cls, value: str) -> str:
        if OF_REQUESTS[value.encode() + b":"][0] != PASS:
            raise ValueError("reserved by cortex: choose another name")
        return value


class WaitingSettings(SettingsModel):
    """`[waiting]`: limits on requests that wait for a model, and how often they get progress comments."""

    per_model: int = Field(default=1024, ge=1)
    total: int = Field(default=4096, ge=1)
    first_comment_secs: float = Field(default=1.0, gt=0)
    comment_interval_secs: float = Field(default=2.0, gt=0)
    plain_keepalive: Literal["off", "whitespace"] = "off"


class UsageSettings(SettingsModel):
    """`[usage]`: the records of what was used."""

    currency: str = Field(default="EUR", pattern=r"^[A-Z]{3}$")  # of the catalogue's prices
    retention_days: int = Field(default=400, ge=0)  # 0: no limit
    daily_retention_days: int = Field(default=3650, ge=0)  # of the daily sums; 0: no limit


class EnergySettings(SettingsModel):
    """`[energy]`: what the GPUs' energy costs."""

    price_per_kwh: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # in `[usage] currency`


@dataclass(frozen=True)
class HostNetwork:
    """How a GPU host is connected to the others. Hosts that give the same `name` share a network; so do all without
    one. `gbps` is the speed of the host's own link in Gbit/s, None if unknown."""

    name: str | None = None
    gbps: float | None = None


class NeuronEntry(SettingsModel):
    """`[[neurons]]`: one GPU host."""

    name: str
    endpoint: str
    token: str | None = Field(default=None, min_length=1)
    token_env: str | None = None
    network: str | None = None  # neurons that name the same one are next to each other
    network_gbps: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # None: as the neuron reports it

    @field_validator("name", "network")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and not _NODE_NAME.fullmatch(value):
            raise ValueError("must start with a letter or digit and hold only letters, digits, '.', '_' and '-'")
        return value

    @field_validator("endpoint")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        _ = parts.port  # raises ValueError for an invalid port
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("must be a URL such as http://host:13131")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _token_is_there(self) -> NeuronEntry:
        if self.token is None and self.token_env is not None and not os.environ.get(self.token_env):
            raise ValueError(f"token_env: the environment variable {self.token_env} is not set")
        return self

    @property
    def bearer_token(self) -> str | None:
        """The token to send to this neuron; None when it needs none."""
        return self.token or (os.environ[self.token_env] if self.token_env else None)

    @property
    def access(self) -> tuple[str, str | None]:
        """How it is reached: the endpoint and the token."""
        return self.endpoint, self.bearer_token


class NeuronTlsSettings(SettingsModel):
    """`[neuron_tls]`: TLS to neurons with an https endpoint. Paths are relative to cortex.toml."""

    ca: Path | None = None  # PEM with the authorities that sign neurons' certificates; None: the system's
    cert: Path | None = None  # PEM with the certificate, and its chain, that neurons see of cortex
    key: Path | None = None

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> NeuronTlsSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key: set both, or neither")
        return self

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.cert, self.key, self.ca)


class CortexConfig(SettingsModel):
    """The whole of cortex.toml."""

    models_config: Path = Path("models.toml")
    state_dir: Path | None = None  # None: see cortex.config.files.state_directory
    database: str | None = None  # None: SQLite in the state directory
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
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
    neuron_tls: NeuronTlsSettings = NeuronTlsSettings()
    neurons: list[NeuronEntry] = Field(default_factory=list)

    @field_validator("database")
    @classmethod
    def _database_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("postgresql://", "postgres://")):
            raise ValueError("must be a URL such as postgresql://user:password@host/name")
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
            "auth": self.auth.model_copy(update={"oidc": found(self.auth.oidc, "client_secret_file")}),
        }
        return self.model_copy(update=tables)

    def keys_path(self, config_file: Path) -> Path | None:
        """The file of keys, relative to the file that names it."""
        return None if self.keys.file is None else config_file.parent / self.keys.file

    def models_path(self, config_file: Path) -> Path:
        """The catalogue's path, relative to the file that names it."""
        return config_file.parent / self.models_config
