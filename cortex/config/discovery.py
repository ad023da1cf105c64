"""`[discovery]` of cortex.toml: how cortex finds neurons that it does not list."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cortex.config.gateway import parse_listen
from cortex.config.neurons import check_token
from shared.settings import SettingsError, SettingsModel, token_lines
from shared.system.cluster import NotInCluster, cluster_here


class DiscoverySettings(SettingsModel):
    """`[discovery]`: how neurons are found that `[[neurons]]` does not list."""

    kind: Literal["static", "dns", "kubernetes", "register"] = "static"
    """`"static"`: only those of `[[neurons]]`. `"dns"`: also each address of `host`. `"kubernetes"`: also each pod that
    `selector` selects. `"register"`: also those that [announce
    themselves](discovery.md#how-do-neurons-announce-themselves)."""
    host: str | None = Field(default=None, min_length=1)
    """`dns`: the name whose addresses are neurons, such as that of a headless Service. Default: required with
    `dns`."""
    selector: str | None = Field(default=None, min_length=1)
    """`kubernetes`: the labels of the neurons' pods, such as `"app.kubernetes.io/name=neuron"`, as for `kubectl get pod
    --selector`. Default: required with `kubernetes`."""
    namespace: str | None = Field(default=None, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """`kubernetes`: the namespace of these pods. Default: that of cortex's pod."""
    port: int = Field(default=13131, ge=1, le=65535)
    """`dns`, `kubernetes`: the port of all of them."""
    tls: bool = False
    """`dns`, `kubernetes`: whether they speak HTTPS; their certificates must then have their addresses."""
    token: str | None = Field(default=None, min_length=1)
    """`dns`, `kubernetes`: the bearer token that all of them expect, if you may store it in the file; overrides
    `token_env`. Default: see `token_env`."""
    token_env: str | None = None
    """`dns`, `kubernetes`: the environment variable that holds the token; it must be set. Default: without `token` too,
    none is sent."""
    interval_secs: float = Field(default=10, gt=0)
    """`dns`: time between two look-ups. `kubernetes`: time until an API or a neuron that did not answer is asked
    again."""
    grace_secs: float = Field(default=60, ge=0)
    """`dns`: how long a neuron stays after DNS has dropped its address."""
    registration_token_env: str | None = None
    """`register`: the environment variable that holds the registration token; it must be set. Default:
    with `register` it or the next key is required."""
    registration_token_file: Path | None = None
    """`register`: instead, a file that holds it, relative to cortex.toml, read at each registration. Each line is a
    token that is accepted, except blank ones and those that begin with `#`. Default: none."""

    dial_listen: str | None = None
    """`register`: the address for the connections of neurons with [`dial =
    "out"`](discovery.md#what-if-cortex-cannot-reach-the-host), `HOST:PORT` or `[IPV6]:PORT`, such as
    `"0.0.0.0:31315"`. It speaks TLS with `[gateway] tls_cert`. Default: none: such a neuron is refused."""

    @field_validator("dial_listen")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            parse_listen(value)
        return value

    @field_validator("host")
    @classmethod
    def _host_name(cls, value: str | None) -> str | None:
        """The resolver would refuse it with the same error, each time."""
        try:
            (value or "").encode("idna")
        except UnicodeError as error:
            raise ValueError(f"not a host name: {error}") from error
        return value

    @model_validator(mode="after")
    def _complete(self) -> DiscoverySettings:
        if self.kind == "dns" and self.host is None:
            raise ValueError('host: with kind = "dns", set it to the name whose addresses are the neurons')
        if self.kind == "kubernetes" and self.selector is None:
            raise ValueError('selector: with kind = "kubernetes", set it to the labels of the neurons\' pods')
        sources = (self.registration_token_env, self.registration_token_file)
        if self.kind == "register" and len([each for each in sources if each is not None]) != 1:
            raise ValueError('with kind = "register", set either registration_token_env or registration_token_file')
        for key in ("token_env", "registration_token_env"):
            variable = getattr(self, key)
            needed = not (key == "token_env" and self.token is not None)
            if needed and variable is not None and not os.environ.get(variable):
                raise ValueError(f"{key}: the environment variable {variable} is not set")
        check_token(self.bearer_token)
        return self

    @property
    def finds(self) -> bool:
        """Whether there may be neurons that `[[neurons]]` does not list."""
        return self.kind != "static"

    @property
    def bearer_token(self) -> str | None:
        """`dns`, `kubernetes`: the token to send to the neurons; None when they need none."""
        return self.token or (os.environ[self.token_env] if self.token_env else None)

    def problems(self) -> list[str]:
        """Why neurons could not be found, though the table itself is valid. Blocks."""
        try:
            if self.kind == "register":
                self.registration_tokens()
            elif self.kind == "kubernetes":
                _ = cluster_here(os.environ)
        except SettingsError as error:
            return list(error.problems)
        except NotInCluster as error:
            return [f'[discovery] kind = "kubernetes" works only in a pod: {error}; elsewhere use "dns" or "register"']
        return []

    def registration_tokens(self) -> list[str]:
        """`register`: the tokens of which neurons must send one. Blocks.

        Raises:
            SettingsError: their file cannot be read, or has none.
        """
        file = self.registration_token_file
        if file is None:
            return [os.environ[self.registration_token_env or ""]]
        try:
            found = token_lines(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SettingsError([f"{file}: {reason}: [discovery] registration_token_file must be readable"]) from error
        if not found:
            raise SettingsError([f"{file}: has no token: write the registration token into it"])
        return found
