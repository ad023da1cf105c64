"""`[group]`, `[sleep]`, `[health]` and `[recovery]` of neuron.toml."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from neuron.config.harness import ordered_ports
from shared.settings import SettingsModel

DEFAULT_GROUP_PORT_RANGE = (21000, 21999)


class GroupSettings(SettingsModel):
    """`[group]`: how engines that span several hosts reach this one."""

    address: str | None = Field(default=None, min_length=1)  # None: the one at which cortex reaches neuron
    interface: str | None = Field(default=None, min_length=1)  # None: the one that has the address
    port_range: tuple[int, int] = DEFAULT_GROUP_PORT_RANGE  # where the parts of an engine meet, first and last
    env: dict[str, str] = Field(default_factory=dict)  # added to the environment of a part

    _ports = field_validator("port_range")(ordered_ports)


class SleepSettings(SettingsModel):
    """`[sleep]`: limits on the host memory of engines, sleeping ones included."""

    ram_reserve_mb: int | None = Field(default=None, ge=0)  # for other programs; None: 4096, at most an eighth


class HealthSettings(SettingsModel):
    """`[health]`: how loaded engines are watched. All in seconds."""

    interval_secs: float = Field(default=0.5, gt=0)
    unresponsive_secs: float = Field(default=30, gt=0)  # a busy API server may take seconds to answer
    hang_grace_secs: float = Field(default=120, gt=0)
    prefill_grace_secs: float = Field(default=900, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> HealthSettings:
        if self.prefill_grace_secs < self.hang_grace_secs:
            least = f"hang_grace_secs, which is {self.hang_grace_secs:g}"
            raise ValueError(f"prefill_grace_secs: {self.prefill_grace_secs:g} is less than {least}")
        return self


class RecoverySettings(SettingsModel):
    """`[recovery]`: what happens when an engine dies without being stopped."""

    max_failures: int = Field(default=5, ge=1)  # in a row; then the model is `failed` until it is loaded again
    backoff_secs: float = Field(default=10, ge=0)  # before the second restart, then doubled; the first is immediate
    max_backoff_secs: float = Field(default=300, ge=0)
    stable_secs: float = Field(default=300, ge=0)  # after serving this long, an engine's failures are forgotten
