"""`[cortex]` of neuron.toml: the cortexes that this neuron announces itself to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from shared.settings import SettingsModel, token_lines


def _checked_url(value: str) -> str:
    parts = urlsplit(value)
    _ = parts.port  # raises ValueError for an invalid port
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"must be a URL such as http://cortex:31313, got {value!r}")
    return value.rstrip("/")


class AnnouncingSettings(SettingsModel):
    """`[cortex]`: the cortexes that this neuron announces itself to, so that they need not list it."""

    urls: list[str] = Field(default_factory=list)
    """Their URLs, such as `["http://cortex:31313"]`; each needs [`[discovery] kind =
    "register"`](discovery.md#how-do-neurons-announce-themselves). Default: none."""
    token_env: str | None = None
    """The environment variable that holds their registration token; it must be set. Default: with `urls` it or the next
    key is required."""
    token_file: Path | None = None
    """Instead, a file that holds it, relative to neuron.toml, read at each announcement. Of several lines the first is
    sent that is not blank and does not begin with `#`. Default: none."""
    dial: Literal["in", "out"] = "in"
    """`"in"`: cortex connects to neuron and its engines. `"out"`: neuron keeps connections to cortex, which reaches it
    and its engines through them; the host needs [no open port](discovery.md#what-if-cortex-cannot-reach-the-host)."""
    endpoint: str | None = None
    """The URL at which they reach this neuron. Default: `host` and `port`; where `host` means all addresses, the one
    that connections to the cortex come from."""
    interval_secs: float = Field(default=10, ge=0.1, le=3600)
    """Time between two announcements. A cortex removes a neuron after three that have not come."""
    ca: Path | None = None
    """PEM file with the authorities that sign their certificates, relative to neuron.toml. Default: those of the
    system."""

    @field_validator("urls")
    @classmethod
    def _urls(cls, value: list[str]) -> list[str]:
        return [_checked_url(url) for url in value]

    @field_validator("endpoint")
    @classmethod
    def _endpoint_url(cls, value: str | None) -> str | None:
        return None if value is None else _checked_url(value)

    @model_validator(mode="after")
    def _token_is_there(self) -> AnnouncingSettings:
        if self.urls and (self.token_env is None) == (self.token_file is None):
            raise ValueError("with urls, set either token_env or token_file, for the cortexes' registration token")
        if self.dials and self.endpoint is not None:
            raise ValueError('endpoint: with dial = "out" cortex does not connect to neuron: remove one of the two')
        if self.token_env is not None and not os.environ.get(self.token_env):
            raise ValueError(f"token_env: the environment variable {self.token_env} is not set")
        return self

    @property
    def dials(self) -> bool:
        """Whether neuron keeps connections to the cortexes."""
        return self.dial == "out"

    def token(self) -> str:
        """The registration token. Blocks. Raises OSError or ValueError if its file cannot be read, or has none."""
        if self.token_file is None:
            return os.environ[self.token_env or ""]
        found = token_lines(self.token_file.read_text(encoding="utf-8"))
        if not found:
            raise ValueError(f"{self.token_file} has no token: write the registration token into it")
        return found[0]
