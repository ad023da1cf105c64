"""The interface between neuron and its engines: what a harness provides, and the facts it gets. Pure."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from neuron.config import HarnessSettings
from neuron.estimate.estimator import MemoryEstimator
from neuron.harness.activity import ActivityProbe
from neuron.harness.adapters import AdapterControl
from neuron.harness.sleep import SleepControl
from neuron.memory.requirement import MemoryRequirement
from neuron.progress.phases import STARTING, LoadReading
from neuron.spec import EngineSpec
from shared.protocol import Device, FailureCause

ENGINE_ID_VARIABLE = "NEURON_ENGINE_ID"
"""In the environment of every process of an engine: `NEURON-INSTANCE/ENGINE-NUMBER`."""
_FRACTION_PARTS = 10_000
# The system's words, asyncio's and Go's, Node's, and llama.cpp's.
_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE|couldn't bind (?:HTTP )?server socket", re.IGNORECASE)


@dataclass(frozen=True)
class LaunchFacts:
    """What does not change while neuron runs. `environ` is what engines inherit, already without neuron's own."""

    has_gpu: bool
    cpus: tuple[int, ...]  # the cores that engines may use
    environ: Mapping[str, str]
    vram_dir: Path  # memory of the simulated GPUs
    ram_total_mb: int | None = None  # of the host; None: not counted
    node_ram_mb: int | None = None  # of the NUMA node that engines on the CPU use first; None: unknown
    device_variable: str | None = None  # gets the indices of devices of an unknown vendor


@dataclass(frozen=True)
class GroupNetwork:
    """How a part of a group reaches the other parts: this host's address among them, the network interface that has it
    (None: unknown), and further variables for the engine's environment."""

    address: str
    interface: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class InstalledEngine:
    """What an engine's installation says without being started. `version` None: unknown. `option_words`: the words of
    each source file that defines its command line, as far as they were found."""

    version: str | None = None
    option_words: tuple[frozenset[str], ...] = ()

    def before(self, *version: int) -> bool:
        """True if it is known to be older. A release candidate or a development build counts as its release."""
        found = re.match(r"\d+(?:\.\d+)*", self.version or "")
        return found is not None and tuple(map(int, found[0].split("."))) < version

    def lacks(self, option: str, *, beside: str) -> bool:
        """True if it is known to have no `option`: the file that defines the option `beside` does not have it. Both as
        Python names, such as `max_model_len`."""
        words = [words for words in self.option_words if beside in words]
        return bool(words) and all(option not in each for each in words)


def memory_fraction(mb: int, total_mb: int) -> str:
    """A part of a memory as engines are given it, "0.0001" to "1.0000". Rounded down: two engines whose parts add up to
    a device must not ask for more than it has."""
    parts = mb * _FRACTION_PARTS // total_mb
    return f"{min(max(parts, 1), _FRACTION_PARTS) / _FRACTION_PARTS:.4f}"


@dataclass(frozen=True)
class LaunchPlan:
    """Everything decided about one engine before it starts.

    `share_mb` is the booking on its smallest device, in MiB; None when its memory is unknown and the engine uses its
    own default.
    """

    spec: EngineSpec
    settings: HarnessSettings
    devices: tuple[Device, ...]  # in the order of the ranks; empty on a host without GPUs
    host: str
    port: int
    tmp_dir: Path
    api_key: str | None  # None: it serves without a key
    engine_id: str
    share_mb: int | None = None
    control_key: str | None = None
    """Secret that neuron sends to the engine to put it to sleep, different for each engine; None: it cannot sleep."""
    network: GroupNetwork | None = None
    """Of a part of a group."""
    installed: InstalledEngine = InstalledEngine()
    ram_mb: int | None = None
    """What is booked for it in the host's RAM; None: none is counted."""
    cores: tuple[int, ...] = ()
    """Those of the host that an engine without devices is to use, some of `LaunchFacts.cpus`; empty: all."""

    @property
    def device_fraction(self) -> str | None:
        """`share_mb` as a part of its smallest device, see `memory_fraction`; None when one of them is unknown."""
        totals = [device.vram_total_mb for device in self.devices if device.vram_total_mb > 0]
        return memory_fraction(self.share_mb, min(totals)) if self.share_mb is not None and totals else None

    @property
    def arguments(self) -> list[str]:
        """The model's own arguments, then the operator's."""
        return [*self.spec.args, *self.settings.extra_args]


@dataclass(frozen=True)
class EngineCommand:
    """A command line and the whole environment it runs in."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class EarlyImports:
    """What a spare process of an engine imports before a load asks for it. The engine must be a Python program.

    `modules`: the first is required, the others are imported if they exist.
    `late_variables`: the environment variables that change before an engine or a child of it starts, and that no import
    reads; if any other changes, that process is started without the spare.
    `spawns`: the engine starts children with multiprocessing's `spawn`, which would import all of it again.
    `child_variables`: by the beginning of a child's name, variables that do not matter to it in addition.
    `automatic`: a spare is worth its memory, so one is kept unless the configuration says otherwise.
    """

    modules: tuple[str, ...]
    late_variables: frozenset[str]
    spawns: bool = False
    child_variables: Mapping[str, frozenset[str]] = field(default_factory=dict)
    automatic: bool = True


@dataclass(frozen=True)
class SilentLoad:
    """The reading of an engine whose output says nothing about its load: `starting` until it answers."""

    phase: str = STARTING
    fraction: float | None = None
    message: str | None = None
    serving: bool = False
    downloaded_secs: float | None = None

    def after(self, line: str) -> SilentLoad:
        return self


class Harness(ABC):
    """One kind of engine. Pure: no method reads or changes anything but its arguments.

    Only `command` is required. The other members default to an engine that has OpenAI's API, answers 200 on
    `health_path` while it serves, and supports nothing else.
    """

    health_path: str = "/health"
    runs_on_gpu: bool = False
    """True: the engine must not start on a host whose GPUs cannot be used."""
    activity: ActivityProbe[Any] | None = None
    """Reads how many requests run and whether the engine hangs; None: its health path is the only sign of life."""
    sleep: SleepControl | None = None
    """Puts an engine to sleep and wakes it; None: it cannot sleep."""
    adapters: AdapterControl | None = None
    """Gives an engine LoRA adapters while it serves; None: it takes none."""
    spans_hosts: bool = False
    """True: engines on several hosts can be parts of one."""
    api_prefix: str = ""
    """What the paths of its API have before `/v1`."""
    context_field: str = "max_model_len"
    """Where an entry of its `/v1/models` has the context length, with dots between nested keys."""
    takes_key: bool = True
    """False: it cannot be told a key, and serves everyone who reaches its port."""
    waits_for_line: bool = False
    """True: it is not ready before `LoadReading.serving`, whatever its health path answers."""
    keeps_booking: bool = False
    """True: what was booked for it stays booked while it holds less, as it may allocate more at any time."""
    cache_variables: Mapping[str, str] = MappingProxyType({})
    """The environment variables of the engine's own cache directories, with their names below the user's cache
    directory."""
    stop_signal: str = "SIGTERM"
    """Asks it to stop."""
    paths: tuple[str, ...] | None = None
    """The paths that it serves; None: unknown."""
    missing_paths: tuple[str, ...] = ()
    """Which of `/v1/messages`, `/v1/messages/count_tokens` and `/v1/responses` its engines lack: cortex translates such
    requests. It also notices by itself where an engine answers 404 or 405."""
    sizes_itself: bool = False
    """True: its engines take the memory that they are told to take, whatever the model's size."""
    estimator: MemoryEstimator | None = None
    """Estimates the memory of a model from its files; None: only `vram_mb` says what it needs."""

    python_package: str | None = None
    """The Python package whose version is the engine's; it is looked for beside the executable."""
    option_files: tuple[str, ...] = ()
    """Its files that define the command line, relative to the directory of packages."""
    version_arguments: tuple[str, ...] = ()
    """With these its executable prints its version and exits."""
    version_pattern: str | None = None
    """Finds the version in what it prints, as its last group; without it or a match, the usual forms do."""

    def program(self, settings: HarnessSettings) -> tuple[str, ...]:
        """The executable and its first arguments; empty if that depends on the load."""
        return tuple(settings.command or ())

    @abstractmethod
    def command(self, plan: LaunchPlan, facts: LaunchFacts) -> EngineCommand:
        """The command line and environment of the engine, which must listen on `plan.host` and `plan.port`."""

    def keep_alive_secs(self, env: Mapping[str, str]) -> float | None:
        """How long an engine with this environment keeps an idle connection open; None: unknown."""
        return None

    def early_imports(self, env: Mapping[str, str]) -> EarlyImports | None:
        """How a spare process of an engine with this environment is made; None: an engine is started only when a load
        asks for it."""
        return None

    def refused_argument(self, args: Sequence[str]) -> str | None:
        """Why one of `args` must not be passed to the engine, naming it; None when all may."""
        return None

    def refused_in_group(self, args: Sequence[str]) -> str | None:
        """Why an engine with `args` cannot be a part of a group, naming one; None when it can."""
        return None

    def refused_spec(self, spec: EngineSpec) -> tuple[str, str] | None:
        """The field of a load command that such an engine cannot fulfil, and why; None when it can."""
        return None

    def tool_arguments(self, names: Sequence[str], args: Sequence[str]) -> tuple[str, ...]:
        """Arguments that make an engine with `args` accept tools, for a model with these `names` (what it loads, then
        its id). By default none is needed.

        Raises:
            InvalidRequest: it is not known how such a model calls tools; the message says what to do.
        """
        return ()

    def code_argument(self, args: Sequence[str]) -> str | None:
        """The first of `args` that makes the engine run code other than its own; None when none does."""
        return None

    def memory_requirement(self, spec: EngineSpec, share_mb: int | None, args: Sequence[str]) -> MemoryRequirement:
        """What an engine with these arguments takes on each device if it is started with `share_mb` MiB. By default
        that share; the whole device without one."""
        return MemoryRequirement(fraction=1.0) if share_mb is None else MemoryRequirement(share_mb)

    def can_sleep(self, plan: LaunchPlan, facts: LaunchFacts) -> bool:
        """True when the engine that `command` starts can be put to sleep with `sleep`."""
        return False

    def first_reading(self) -> LoadReading:
        """The state of a load before the engine's first line of output."""
        return SilentLoad()

    def root_cause(self, lines: Sequence[str]) -> str | None:
        """The error that made the engine exit, from its last output lines; None when they name none."""
        return None

    def port_was_taken(self, lines: Sequence[str]) -> bool:
        """True if the last output lines say that another process listens on the engine's port."""
        return any(_PORT_TAKEN.search(line) for line in lines[-50:])

    def is_permanent(self, error: str, *, path_missing: bool) -> bool:
        """True if the same engine would fail on this host again, whenever it is started. Arguments: see `cause_of`."""
        return False

    def cause_of(self, error: str, *, path_missing: bool) -> FailureCause:
        """Whether the host or the model is at fault for an error that `root_cause` found. `path_missing` True when the
        model is a path that does not exist on this host."""
        return FailureCause.UNKNOWN
