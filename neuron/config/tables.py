"""`[group]`, `[sleep]`, `[health]` and `[recovery]` of neuron.toml."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from neuron.config.harness import ordered_ports
from shared.settings import SettingsModel

DEFAULT_GROUP_PORT_RANGE = (21000, 21999)


class GroupSettings(SettingsModel):
    """`[group]`: how engines that span several hosts reach this one."""

    address: str | None = Field(default=None, min_length=1)
    """Address at which the other hosts reach this one, also vLLM's `VLLM_HOST_IP`. Default: the one at which cortex
    reaches neuron; for vLLM the one that a connection to rank 0 has."""
    interface: str | None = Field(default=None, min_length=1)
    """Network interface for NCCL and gloo (`NCCL_SOCKET_IFNAME`, `GLOO_SOCKET_IFNAME`). Default: what neuron's own
    environment says, otherwise the interface that has the address."""
    port_range: tuple[int, int] = DEFAULT_GROUP_PORT_RANGE
    """First and last port where an engine's parts meet."""
    env: dict[str, str] = Field(default_factory=dict)
    """Added to the environment of a part, such as `NCCL_IB_HCA`; `[harness.NAME] env` overrides it. Default:
    nothing."""

    _ports = field_validator("port_range")(ordered_ports)


class SleepSettings(SettingsModel):
    """`[sleep]`: limits on the host memory of engines, sleeping ones included."""

    ram_reserve_mb: int | None = Field(default=None, ge=0)
    """MiB of host memory that engines on the CPU and sleeping engines leave free ([memory.md](memory.md#what-counts));
    a load or sleep that would need part of it gets 409. Default: `4096`, at most an eighth of it."""


class HealthSettings(SettingsModel):
    """`[health]`: how loaded engines are watched. All in seconds."""

    interval_secs: float = Field(default=0.5, gt=0)
    """Time between two health checks of an engine; its metrics are read half as often. Two checks in a row that are not
    200, or refused connections, make the engine bad."""
    unresponsive_secs: float = Field(default=30, gt=0)
    """An engine whose health check gets no answer for this long is bad."""
    hang_grace_secs: float = Field(default=120, gt=0)
    """An engine that has running requests and counts no token for this long is hung, whatever its health check says."""
    prefill_grace_secs: float = Field(default=900, gt=0)
    """The same while every running request may still wait for its first token, since a long prompt is not a hang; at
    least `hang_grace_secs`."""

    @model_validator(mode="after")
    def _consistent(self) -> HealthSettings:
        if self.prefill_grace_secs < self.hang_grace_secs:
            least = f"hang_grace_secs, which is {self.hang_grace_secs:g}"
            raise ValueError(f"prefill_grace_secs: {self.prefill_grace_secs:g} is less than {least}")
        return self


class RecoverySettings(SettingsModel):
    """`[recovery]`: what happens when an engine dies without being stopped."""

    max_failures: int = Field(default=5, ge=1)
    """Failures in a row after which the model is `failed` until it is loaded again."""
    backoff_secs: float = Field(default=10, ge=0)
    """Pause before the second restart in a row; doubles each time."""
    max_backoff_secs: float = Field(default=300, ge=0)
    """The longest pause."""
    stable_secs: float = Field(default=300, ge=0)
    """An engine that has served this long starts a new row of failures."""
