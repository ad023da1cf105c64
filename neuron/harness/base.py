"""What a harness has to offer, and the facts it decides from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from neuron.config import HarnessName, HarnessSettings
from neuron.memory.requirement import Need
from neuron.progress.phases import LoadReading
from neuron.spec import EngineSpec
from shared.protocol import Device, FailureCause

ENGINE_ID_VARIABLE = "NEURON_ENGINE_ID"
"""In the environment of every process of an engine: `NEURON-INSTANCE/ENGINE-NUMBER`."""


@dataclass(frozen=True)
class HostFacts:
    """What does not change while neuron runs. `environ` is what engines inherit, already without neuron's own."""

    has_gpu: bool
    cpus: tuple[int, ...]  # the cores this process may use
    environ: Mapping[str, str]
    vram_dir: Path  # memory of the simulated GPUs


@dataclass(frozen=True)
class LaunchPlan:
    """Everything decided about one engine before it starts.

    `share_mb` is what was booked on the smallest of its devices (on each, when they are alike), in MiB; None when
    nothing is known of the need, and the engine takes what it takes by default.
    """

    spec: EngineSpec
    settings: HarnessSettings
    devices: tuple[Device, ...]  # empty on a host without GPUs
    host: str
    port: int
    tmp_dir: Path
    api_key: str
    engine_id: str
    share_mb: int | None = None
    control_key: str | None = None
    """What neuron shows the engine to put it to sleep, another secret for each; None: it shall not be able to."""

    @property
    def arguments(self) -> list[str]:
        """The model's own arguments, then the operator's."""
        return [*self.spec.args, *self.settings.extra_args]


@dataclass(frozen=True)
class EngineCommand:
    """A command line and the whole environment it runs in."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


class Harness(Protocol):
    """Pure: no method reads or changes anything but its arguments."""

    @property
    def name(self) -> HarnessName: ...

    @property
    def health_path(self) -> str:
        """Answers 200 once, and as long as, the engine serves."""
        ...

    @property
    def runs_on_gpu(self) -> bool:
        """True when an engine on a host whose GPUs cannot be used would be a mistake."""
        ...

    def memory_need(self, spec: EngineSpec, share_mb: int | None, args: Sequence[str]) -> Need:
        """What an engine with these arguments will take on each device, when it is meant to take `share_mb`."""
        ...

    @property
    def sleeps_in_ram(self) -> bool:
        """True when the weights of a sleeping engine take memory of this host."""
        ...

    def command(self, plan: LaunchPlan, facts: HostFacts) -> EngineCommand: ...

    def can_sleep(self, plan: LaunchPlan, facts: HostFacts) -> bool:
        """True when the engine that `command` starts can be put to sleep (`neuron.lifecycle.sleep`)."""
        ...

    def weights_mb(self, lines: Sequence[str], ranks: int) -> int | None:
        """MiB of weights on all `ranks` devices together, as the output of its load tells; None when it does not."""
        ...

    def first_reading(self) -> LoadReading:
        """What is known of a load before the engine's first line."""
        ...

    def root_cause(self, lines: Sequence[str]) -> str | None:
        """The error that made the engine end, from its last output lines; None when they name none."""
        ...

    def cause_of(self, error: str, *, path_missing: bool) -> FailureCause:
        """Whose doing an error found by `root_cause` is. `path_missing` True when the model is a path that is not on
        this host."""
        ...
