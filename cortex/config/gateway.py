"""`[gateway]` of cortex.toml: where clients and Prometheus reach cortex."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from shared.cross_site import checked_hosts, checked_origins
from shared.settings import SettingsModel
from shared.tls import TlsFiles


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
    """Address for clients, `HOST:PORT` or `[IPV6]:PORT`; with port 0 the system chooses. Default: `"127.0.0.1:31313"`:
    this host only."""
    metrics_listen: str = "127.0.0.1:31314"
    """Address for Prometheus, separate from clients."""
    workers: int = Field(default=1, ge=1, le=256)
    """Processes that serve clients on the one port, 1 to 256; `cortex serve --workers N` overrides it. With 1, cortex
    is a single process."""
    max_body_mib: int = Field(default=32, ge=1, le=4096)
    """Largest request body in MiB, 1 to 4096; a larger one gets 413."""
    drain_timeout_secs: float = Field(default=30, ge=0)
    """How long running requests may continue after SIGTERM."""
    keepalive_secs: float = Field(default=15, gt=0)
    """An event stream that is silent for this long gets a comment, see
    [api.md](api.md#what-does-a-stream-get-while-it-waits)."""
    default_model: str | None = Field(default=None, min_length=1)
    """Id or alias of the model for requests that name none. Default: none: such a request gets 400."""
    allowed_origins: list[str] = Field(default_factory=list)
    """Origins of web pages that may use cortex, such as `"https://chat.example.com"`; `"*"` allows all. Pages that
    cortex serves itself need no entry ([security.md](security.md)). Default: none."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Public names that clients reach cortex under, such as `"ai.example.com"` or `"*.example.com"`; `"*"` allows all.
    Addresses and private names need no entry ([security.md](security.md#which-names-can-a-client-use)). Default:
    none."""
    allow_anonymous: bool = False
    """`true`: clients need no [API key](keys.md#who-may-come-without-a-key). Those from the network may only use
    models, and those with a key go first. `false`: without any key cortex refuses to listen on the network."""
    metrics_token: str | None = Field(default=None, min_length=1)
    """The bearer token that Prometheus has to send to `metrics_listen`. Default: none is needed."""
    metrics_token_env: str | None = None
    """The environment variable that has this token. Default: none."""
    tls_cert: Path | None = None
    """PEM file with the certificate that clients of `listen` see, and its chain; relative to cortex.toml
    ([HTTPS](configuration.md#how-does-cortex-serve-https)). Default: none: HTTP without TLS."""
    tls_key: Path | None = None
    """PEM file with its key, without a password. Default: none."""

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
