"""The file that `cortex simulate --fleet` reads: hosts, models, how long loads take, and the planner's rules."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cortex.config.aliases import Alias
from cortex.config.catalogue import Catalogue, load_catalogue
from cortex.config.model_tables import ComputeCapability, ModelName
from cortex.config.profile import ModelProfile
from cortex.config.settings import PlacementSettings
from shared.gpus import PRESETS, find_preset
from shared.protocol import RAM, Device, Link, LinkKind
from shared.settings import SettingsError, SettingsModel, read_toml, validate_settings

Secs = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SimulatedGpu(SettingsModel):
    """A GPU given in full, for hardware without a preset."""

    name: str = "GPU"
    vram_total_mb: int = Field(gt=0)
    compute_capability: ComputeCapability | None = None
    kind: Literal["gpu", "mig"] = "gpu"


class LinkEntry(SettingsModel):
    """How two GPUs of a node are connected."""

    a: int = Field(ge=0)
    b: int = Field(ge=0)
    kind: LinkKind


class SimulatedNode(SettingsModel):
    """`[[nodes]]`: one host. Its loads take `load_factor` times the file's durations. `ram_mb` is for models on the
    CPU; None: there are none, unless a device shares the RAM."""

    name: str = Field(min_length=1)
    devices: tuple[SimulatedGpu | str, ...] = Field(default=(), max_length=64)
    ram_mb: int | None = Field(default=None, gt=0)
    links: tuple[LinkEntry, ...] = ()
    harnesses: tuple[str, ...] = ("vllm",)
    load_factor: Factor = 1.0

    @field_validator("devices", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in value if isinstance(value, list) else ():
            if isinstance(name, str) and find_preset(name) is None:
                known = ", ".join(preset.name for preset in PRESETS)
                raise ValueError(
                    f"{name!r}: no such preset: write {{ name = …, vram_total_mb = … }}, or one of {known}"
                )
        return value

    @model_validator(mode="after")
    def _has_memory(self) -> SimulatedNode:
        if not self.devices and self.ram_mb is None:
            raise ValueError(f"{self.name!r} has neither devices nor ram_mb")
        return self

    @model_validator(mode="after")
    def _links_join_devices(self) -> SimulatedNode:
        for link in self.links:
            if not link.a < link.b < len(self.devices):
                raise ValueError(
                    f"links: {link.a} and {link.b} must be two devices of {self.name!r}, lower index first"
                )
        return self

    @cached_property
    def gpus(self) -> tuple[Device, ...]:
        """The devices, with presets resolved."""
        return tuple(_device(index, entry) for index, entry in enumerate(self.devices))

    @cached_property
    def ram(self) -> Device | None:
        """The host's RAM, which unified devices share; None if it is not counted."""
        total = self.ram_mb or max((gpu.vram_total_mb for gpu in self.gpus if gpu.unified), default=None)
        return None if total is None else Device(index=RAM, name="RAM", vram_total_mb=total)

    @property
    def total_mb(self) -> int:
        """All memory that models can use, in MiB."""
        own = sum(gpu.vram_total_mb for gpu in self.gpus if not gpu.unified)
        return own + (0 if self.ram is None else self.ram.vram_total_mb)

    @cached_property
    def paths(self) -> list[Link]:
        return [Link(a=link.a, b=link.b, kind=link.kind) for link in self.links]


class LoadSecs(SettingsModel):
    """`[load_secs]`: a load takes `base` and `per_gb` for each GiB of the model's `vram_mb`, or what `models` says."""

    base: Secs = 10.0
    per_gb: Secs = 1.0
    models: dict[ModelName, Secs] = Field(default_factory=dict)
    unload: Secs = 2.0


class Serving(SettingsModel):
    """`[serving]`: how many requests an engine serves at full speed; more share that speed."""

    parallel: int = Field(default=16, ge=1)
    models: dict[ModelName, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    timeout_secs: float = Field(default=1800, gt=0)  # waiting for a model, as [cold_load] timeout_secs


class FleetFile(SettingsModel):
    """The whole file. Models come from `models_config`, a path relative to this file, or are listed in it."""

    nodes: tuple[SimulatedNode, ...] = Field(min_length=1)
    models_config: Path | None = None
    models: tuple[ModelProfile, ...] = ()
    aliases: dict[ModelName, Alias] = Field(default_factory=dict)
    load_secs: LoadSecs = LoadSecs()
    serving: Serving = Serving()
    placement: PlacementSettings = PlacementSettings()

    @field_validator("nodes")
    @classmethod
    def _distinct(cls, value: tuple[SimulatedNode, ...]) -> tuple[SimulatedNode, ...]:
        names = [node.name for node in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"duplicate node name {twice[0]!r}")
        return value

    @model_validator(mode="after")
    def _models_from_one_place(self) -> FleetFile:
        if (self.models_config is None) == (not self.models):
            raise ValueError("give either models_config or [[models]]")
        if self.aliases and self.models_config is not None:
            raise ValueError("aliases: move them to the file that models_config names")
        return self


class SimulatedFleet:
    """A fleet file and its catalogue."""

    def __init__(self, file: FleetFile, catalogue: Catalogue) -> None:
        self.file = file
        self.catalogue = catalogue
        self.rules = file.placement.rules()

    def load_secs(self, model_id: str, node: SimulatedNode, vram_mb: int | None = None) -> float:
        """How long a model of the catalogue takes to load there, from the command to the neuron until it serves.
        `vram_mb` is that of its variant, where it differs from the model's, or of the part that this node loads."""
        rule = self.file.load_secs
        secs = rule.models.get(model_id)
        if secs is None:
            profile = self.catalogue.profile(model_id)
            secs = rule.base + rule.per_gb * (vram_mb or (profile.vram_mb if profile else 0) or 0) / 1024
        return secs * node.load_factor

    def parallel(self, model_id: str) -> int:
        return self.file.serving.models.get(model_id, self.file.serving.parallel)


def load_fleet(path: Path) -> SimulatedFleet:
    """Reads the fleet file, and the catalogue it names.

    Raises:
        SettingsError: with a line for every problem found, naming file and key.
    """
    data = read_toml(path)
    file = validate_settings(FleetFile, data, source=str(path))
    if file.models_config is not None:
        source = path.parent / file.models_config
        catalogue = load_catalogue(source)
    else:
        source = path
        tables: dict[str, object] = {key: data[key] for key in ("models", "aliases") if key in data}
        catalogue = validate_settings(Catalogue, tables, source=str(path))
    problems = [
        f"{source}: models[{index}].vram_mb: required here, since nothing measures the model {profile.id!r}"
        for index, profile in enumerate(catalogue.models)
        if profile.base is None and any(choice.vram_mb is None for choice in profile.choices)
    ]
    for table, models in (("load_secs", file.load_secs.models), ("serving", file.serving.models)):
        unknown = [model_id for model_id in models if catalogue.profile(model_id) is None]
        problems += [f"{path}: {table}.models: {model_id!r} is not in the catalogue" for model_id in unknown]
    if problems:
        raise SettingsError(problems)
    return SimulatedFleet(file, catalogue)


def _device(index: int, entry: SimulatedGpu | str) -> Device:
    if isinstance(entry, SimulatedGpu):
        return Device(index=index, **entry.model_dump())
    preset = find_preset(entry)
    assert preset is not None
    return Device(
        index=index,
        name=preset.name,
        vram_total_mb=preset.vram_total_mb,
        compute_capability=preset.compute_capability,
        unified=preset.unified,
    )
