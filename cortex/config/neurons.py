"""`[[neurons]]` and `[neuron_tls]` of cortex.toml: the GPU hosts and how they are reached."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from shared.settings import SettingsModel
from shared.tls import TlsFiles

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")  # as long as a name in DNS or of a node of Kubernetes
NODE_NAME_RULE = "must start with a letter or digit and hold only letters, digits, '.', '_' and '-', at most 253 in all"


def is_node_name(text: str) -> bool:
    """Whether a neuron may have this name."""
    return _NODE_NAME.fullmatch(text) is not None


def check_token(token: str | None) -> None:
    """Raises ValueError for a bearer token that cannot be sent in a header. White space around it is not sent."""
    if any(ord(character) < 32 or ord(character) == 127 for character in (token or "").strip()):
        raise ValueError("token: must not contain line breaks or other control characters")


@dataclass(frozen=True)
class HostNetwork:
    """How a GPU host is connected to the others. Hosts that give the same `name` share a network; so do all without
    one. `gbps` is the speed of the host's own link in Gbit/s, None if unknown."""

    name: str | None = None
    gbps: float | None = None


class NeuronEntry(SettingsModel):
    """`[[neurons]]`: one GPU host."""

    name: str
    """Its name in answers, metrics and `pinned_on`: at most 253 letters, digits, `.`, `_` and `-`; unique."""
    endpoint: str
    """URL of its neuron, `http://` or `https://`."""
    token: str | None = Field(default=None, min_length=1)
    """The bearer token it expects, if you may store it in the file; overrides `token_env`. Default: see `token_env`."""
    token_env: str | None = None
    """The environment variable that holds the token; it must be set. Default: without `token` too, none is sent."""
    network: str | None = None
    """Name of the network that it shares with the neurons that give the same one, for [models that span
    hosts](spanning.md#which-hosts): the same characters as in `name`. Default: one network with all others that give
    none."""
    network_gbps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Speed of its link to that network in Gbit/s. Default: as the neuron reports it."""

    @field_validator("name", "network")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and not is_node_name(value):
            raise ValueError(NODE_NAME_RULE)
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
        check_token(self.bearer_token)
        return self

    @classmethod
    def dialling(cls, name: str, token: str | None) -> NeuronEntry:
        """The entry of a neuron that keeps connections to cortex. Its endpoint cannot be written into cortex.toml: such
        a neuron has to register. Raises ValueError."""
        checked = cls(name=name, endpoint="http://localhost", token=token)
        return checked.model_copy(update={"endpoint": f"dial://{name}"})

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

    ca: Path | None = None
    """PEM file with the authorities that sign the neurons' certificates. Default: those of the system."""
    cert: Path | None = None
    """PEM file with the certificate, and its chain, that cortex shows to neurons with `tls_client_ca`. Default:
    none."""
    key: Path | None = None
    """PEM file with its key, without a password. Default: none."""

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> NeuronTlsSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key: set both, or neither")
        return self

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.cert, self.key, self.ca)
