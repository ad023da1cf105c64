"""models.toml: the models that clients may request, and their other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator, model_validator

from cortex.config.aliases import Alias, Rewrite
from cortex.config.model_tables import ModelName
from cortex.config.profile import ModelProfile, RequestedModel
from shared.settings import SettingsModel, load_settings

DEFAULT_MAX_LORAS = 4
"""How many adapters an engine can have whose model has some, unless its entry says how many."""


def _names_of_variants(models: Sequence[ModelProfile]) -> dict[str, ModelProfile]:
    """Each variant by what a request for it says, `id@variant`."""
    return {
        choice.requested.name: choice for profile in models for choice in profile.choices if choice.variant is not None
    }


class LoraSettings(NamedTuple):
    """What an engine is prepared for: up to `max_loras` adapters at a time, of a rank up to `max_rank`; None leaves
    that to the neuron, which looks at `sources`, the weights of all adapters of the model."""

    max_loras: int
    max_rank: int | None
    sources: tuple[str, ...]


class Catalogue(SettingsModel):
    """The whole of models.toml."""

    models: tuple[ModelProfile, ...] = ()
    aliases: dict[ModelName, Alias] = Field(default_factory=dict)

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: tuple[ModelProfile, ...]) -> tuple[ModelProfile, ...]:
        seen: set[str] = set()
        for profile in value:
            if profile.id in seen:
                raise ValueError(f"the model {profile.id!r} is listed twice")
            seen.add(profile.id)
        for name, choice in _names_of_variants(value).items():
            if name in seen:
                raise ValueError(
                    f"{name!r} is the id of a model and also stands for the variant {choice.variant!r} of "
                    f"{choice.id!r}: rename one"
                )
        return value

    @model_validator(mode="after")
    def _aliases_lead_somewhere(self) -> Catalogue:
        ids = {profile.id for profile in self.models}
        for alias, target in self.targets.items():
            if alias in ids:
                raise ValueError(f"aliases: {alias!r} is also the id of a model")
            if alias in self._variants:
                raise ValueError(f"aliases: {alias!r} is also a variant of {self._variants[alias].id!r}")
            if target in self.targets:
                raise ValueError(f"aliases: {alias!r} points to {target!r}, an alias too: name its model")
            if self.profile(target) is None:
                meant = self.model_meant_by(target)
                hint = "" if meant is None else f" ({meant.variants_text})"
                raise ValueError(f"aliases: {alias!r} points to {target!r}, which is not in this catalogue{hint}")
        return self

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> Catalogue:
        for adapter in self.adapters.values():
            base = self._by_id.get(adapter.base or "")
            if base is None:
                raise ValueError(
                    f"models: the base of the adapter {adapter.id!r}, {adapter.base!r}, is not the id of a model in "
                    "this catalogue"
                )
            if base.base is not None:
                raise ValueError(
                    f"models: the base of the adapter {adapter.id!r} is {base.id!r}, which is an adapter of "
                    f"{base.base!r} itself: name a model"
                )
            other = next((choice.harness for choice in base.choices if not choice.serves_as_vllm), None)
            if other is not None:
                raise ValueError(
                    f"models: {base.id!r}, the base of the adapter {adapter.id!r}, has the harness {other!r}: only "
                    "vllm and sim can load adapters"
                )
        return self

    @cached_property
    def _by_id(self) -> dict[str, ModelProfile]:
        return {profile.id: profile for profile in self.models}

    @cached_property
    def adapters(self) -> Mapping[str, ModelProfile]:
        """The entries that are LoRA adapters of another model, by id."""
        return {profile.id: profile for profile in self.models if profile.base is not None}

    @cached_property
    def _adapters_of(self) -> Mapping[str, tuple[ModelProfile, ...]]:
        found: dict[str, tuple[ModelProfile, ...]] = {}
        for adapter in self.adapters.values():
            found[adapter.base or ""] = (*found.get(adapter.base or "", ()), adapter)
        return found

    def loras(self, model_id: str) -> LoraSettings | None:
        """How an engine of the model is prepared for its adapters; None if it takes none."""
        profile, adapters = self._by_id.get(model_id), self._adapters_of.get(model_id, ())
        given = None if profile is None else profile.max_loras
        if profile is None or not (given or adapters):
            return None
        sources = tuple(adapter.lora for adapter in adapters if adapter.lora is not None)
        return LoraSettings(given or DEFAULT_MAX_LORAS, profile.max_lora_rank, sources)

    @cached_property
    def _variants(self) -> dict[str, ModelProfile]:
        return _names_of_variants(self.models)

    @cached_property
    def targets(self) -> Mapping[str, str]:
        """The id, or `id@variant`, that each alias stands for."""
        return {name: alias.model for name, alias in self.aliases.items()}

    @cached_property
    def rewrites(self) -> Mapping[str, Rewrite]:
        """What stands in for the names that engines do not know: aliases, `id@variant` and `alias@variant`."""
        found = {name: Rewrite(choice.id, name) for name, choice in self._variants.items()}
        for alias, target in self.targets.items():
            requested = RequestedModel(target) if target in self.adapters else self.requested(target)
            edits = self.aliases[alias].edits(requested.model_id)
            found[alias] = Rewrite(requested.model_id, requested.name, edits)
            for name, choice in self._through(alias):
                found[name] = Rewrite(choice.id, choice.requested.name, edits)
        return found

    def _through(self, alias: str) -> Iterator[tuple[str, ModelProfile]]:
        """`alias@variant` for each variant of the alias's model, as far as nothing else has that name."""
        profile = self._by_id.get(self.targets[alias])
        for choice in () if profile is None else profile.choices:
            name = f"{alias}@{choice.variant}"
            if choice.variant is not None and name not in self._by_id and name not in self.aliases:
                yield name, choice

    def alias_of(self, name: str) -> Alias | None:
        """The alias that a name goes through, itself or as `alias@variant`; None for any other name."""
        found = self.aliases.get(name)
        return self.aliases.get(name.rpartition("@")[0]) if found is None and name in self.rewrites else found

    def profile(self, name: str) -> ModelProfile | None:
        """The model with this id, for `id@variant` the profile of that variant, and for an adapter that of its base;
        None when the catalogue does not have it."""
        found = self._by_id.get(name) or self._variants.get(name)
        return found if found is None or found.base is None else self._by_id.get(found.base)

    def requested(self, name: str) -> RequestedModel:
        """Which engines an id, an adapter or `id@variant` needs. A name that the catalogue does not have is an id."""
        choice = self._variants.get(name)
        if choice is None:
            adapter = self.adapters.get(name)
            return RequestedModel(name if adapter is None or adapter.base is None else adapter.base)
        return choice.requested

    def running(self, model_id: str, variant: str | None) -> RequestedModel:
        """What a neuron runs that reports this variant: without it if the catalogue has no such variant."""
        found = RequestedModel(model_id, variant)
        return found if found.name in self._variants else RequestedModel(model_id)

    def names_of(self, model_id: str) -> tuple[str, ...]:
        """The names that its engines may serve: the id, `id@variant` for each variant, and its adapters."""
        profile = self._by_id.get(model_id)
        variants = () if profile is None or not profile.variants else profile.choices
        adapters = (adapter.id for adapter in self._adapters_of.get(model_id, ()))
        return model_id, *(choice.requested.name for choice in variants), *adapters

    @property
    def has_variants(self) -> bool:
        return bool(self._variants)

    @property
    def has_other_names(self) -> bool:
        """True if `names_of` a model may be more than its id."""
        return bool(self._variants or self.adapters)

    def model_meant_by(self, name: str) -> ModelProfile | None:
        """The model for `id@something` or `alias@something`, whatever its variants; None for any other name."""
        prefix, _, wanted = name.rpartition("@")
        return self._by_id.get(self.targets.get(prefix, prefix)) if prefix and wanted else None

    def resolve(self, name: str) -> str:
        """The id, or `id@variant`, for a name that may be an alias."""
        found = self.rewrites.get(name)
        return name if found is None else found.name


NO_MODELS = Catalogue()


def load_catalogue(path: Path) -> Catalogue:
    """Reads and validates models.toml.

    Raises:
        SettingsError: with every problem found.
    """
    return load_settings(Catalogue, path, env_prefix="", environ={})
