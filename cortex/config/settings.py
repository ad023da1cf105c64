"""cortex.toml."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from cortex.config.gateway import GatewaySettings
from cortex.config.neurons import HostNetwork, NeuronEntry, NeuronTlsSettings
from cortex.config.sign_in import AuthSettings
from cortex.http.headers import OF_REQUESTS, PASS
from shared.settings import SettingsModel


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
