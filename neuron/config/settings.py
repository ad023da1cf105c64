"""neuron.toml as a whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from neuron.config.announcing import AnnouncingSettings
from neuron.config.devices import AcceleratorEntry, SimulateSettings
from neuron.config.harness import HarnessEntry, HarnessSettings
from neuron.config.tables import GroupSettings, HealthSettings, RecoverySettings, SleepSettings
from shared.cross_site import checked_hosts
from shared.protocol import FIRST_INSTANCE, LoadCommand
from shared.protocol.commands import WantedModel
from shared.protocol.parallel import ParallelSettings
from shared.settings import SettingsModel
from shared.tls import TlsFiles

DEFAULT_HARNESS = "vllm"
"""What a neuron offers without `[[harnesses]]`."""
KeyMode = Literal["auto", "always", "never"]
"""`engine_keys`: see `neuron.engine.keys`."""


class DefaultModel(WantedModel):
    """An entry of `[[default_models]]`: a load command in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")

    parallel: ParallelSettings | None = None


class NeuronConfig(SettingsModel):
    """neuron.toml. Load it as `neuron.harness.checks.CheckedConfig`, which knows the harnesses."""

    name: str | None = None
    """Name of this host. Default: the host name."""
    host: str = "127.0.0.1"
    """Address that neuron and its engines bind; cortex must be able to reach it. Default: `"127.0.0.1"`: a cortex on
    the same host only."""
    port: int = Field(default=13131, ge=0, le=65535)
    """Neuron's port; with 0 the system chooses."""
    token: str | None = Field(default=None, min_length=1)
    """The bearer token that callers must send; overrides `token_env`. Default: see `token_env`."""
    token_env: str | None = None
    """The environment variable that holds the token; it must be set. Default: without `token` too, callers on this host
    need none, and neuron refuses to listen on the network
    ([security.md](security.md#what-may-listen-on-the-network))."""
    tls_cert: Path | None = None
    """PEM file with the certificate that callers see, and its chain; relative to neuron.toml. neuron then speaks HTTPS,
    and cortex's `endpoint` starts with `https://`. It reads the files again when they change. Default: none: HTTP
    without TLS."""
    tls_key: Path | None = None
    """PEM file with its key, without a password. Default: none."""
    tls_client_ca: Path | None = None
    """PEM file with authorities: callers need a certificate that one of them has signed, which cortex has in
    [`[neuron_tls]`](reference/cortex.md#neuron_tls). Default: none: callers need no certificate."""
    allow_anonymous: bool = False
    """`true`: listen on the network without a token; anyone who can reach the port may then run code on this host."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Public names that callers without a token may use, such as `"gpu1.example.com"` or `"*.example.com"`; `"*"`
    allows all. Addresses and private names need no entry ([security.md](security.md#which-names-can-a-client-use)).
    Default: none."""
    engine_keys: KeyMode = "auto"
    """Which engines get a key: `"auto"`, `"always"` or `"never"`
    ([security.md](security.md#which-engines-get-a-key))."""
    state_dir: Path | None = None
    """Directory for engines' run records, logs and temporary files, and for load history; used by one neuron at a time.
    A new neuron finds there what an earlier one left. Default: a directory of this user and port under the system's
    temporary directory, removed at the end."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """`debug`, `info`, `warning` or `error`. Libraries log nothing below `info`."""
    log_format: Literal["text", "json"] = "text"
    """`text`, or `json`: one object a line with `time` (ISO 8601, UTC), `level`, `logger`, `message`, `request_id` and
    `exception`."""
    drain_timeout_secs: float = Field(default=30, ge=0)
    """How long running requests may continue after SIGTERM before engines are stopped."""
    on_stop: Literal["stop_engines", "leave_engines"] = "stop_engines"
    """`stop_engines`: stopping neuron drains and stops its engines. `leave_engines`: they keep running and serving, and
    the next neuron with this `state_dir` adopts them."""
    recovery: RecoverySettings = Field(default_factory=RecoverySettings)
    harness: Mapping[str, HarnessSettings] = Field(default_factory=dict)
    harnesses: list[HarnessEntry] | None = None  # None: see `harness_names`
    group: GroupSettings = Field(default_factory=GroupSettings)
    health: HealthSettings = Field(default_factory=HealthSettings)
    sleep: SleepSettings = Field(default_factory=SleepSettings)
    accelerators: list[AcceleratorEntry] = Field(default_factory=list)  # not empty: no driver is asked
    simulate: SimulateSettings | None = None
    cortex: AnnouncingSettings = Field(default_factory=AnnouncingSettings)
    model_roots: list[Path] = Field(default_factory=list)
    """Absolute directories; a model given as a path must be below one of them. Default: any path."""
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
        if self.tls_cert is not None and self.cortex.dials:
            raise ValueError(
                'tls_cert: cannot be used with [cortex] dial = "out": the connections to cortex are encrypted if its '
                "URL begins with https://"
            )
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
