"""neuron.toml, table by table: what a host offers, how its engines are started and watched, validated by pydantic. The
docstring below each key is its entry in docs/reference/neuron.md. Every package of neuron may read it."""

from neuron.config.announcing import AnnouncingSettings
from neuron.config.devices import AcceleratorEntry, SimulatedDevice, SimulateSettings
from neuron.config.harness import (
    ActivitySettings,
    EngineDescription,
    ErrorPattern,
    HarnessEntry,
    HarnessSettings,
    ProgressPattern,
)
from neuron.config.settings import DEFAULT_HARNESS, KeyMode, NeuronConfig
from neuron.config.tables import GroupSettings, HealthSettings, RecoverySettings

__all__ = [
    "DEFAULT_HARNESS",
    "AcceleratorEntry",
    "ActivitySettings",
    "AnnouncingSettings",
    "EngineDescription",
    "ErrorPattern",
    "GroupSettings",
    "HarnessEntry",
    "HarnessSettings",
    "HealthSettings",
    "KeyMode",
    "NeuronConfig",
    "ProgressPattern",
    "RecoverySettings",
    "SimulateSettings",
    "SimulatedDevice",
]
