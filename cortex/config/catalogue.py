"""models.toml: the models that clients may request, and their other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from cortex.config.aliases import Alias, Rewrite
from cortex.config.profile import ModelName, ModelProfile, RequestedModel
from shared.settings import SettingsModel, load_settings


def _names_of_variants(models: Sequence[ModelProfile]) -> dict[str, ModelProfile]:
    """Each variant by what a request for it says, `id@variant`."""
    return {
        choice.requested.name: choice for profile in models for choice in profile.choices if choice.variant is not None
    }


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

    @cached_property
    def _by_id(self) -> dict[str, ModelProfile]:
        return {profile.id: profile for profile in self.models}

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
            requested = self.requested(target)
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
        """The model with this id, or for `id@variant` the profile of that variant; None when the catalogue does not
        have it."""
        return self._by_id.get(name) or self._variants.get(name)

    def requested(self, name: str) -> RequestedModel:
        """What an id or `id@variant` stands for. A name that the catalogue does not have is an id."""
        choice = self._variants.get(name)
        return RequestedModel(name) if choice is None else choice.requested

    def running(self, model_id: str, variant: str | None) -> RequestedModel:
        """What a neuron runs that reports this variant: without it if the catalogue has no such variant."""
        found = RequestedModel(model_id, variant)
        return found if found.name in self._variants else RequestedModel(model_id)

    def names_of(self, model_id: str) -> tuple[str, ...]:
        """The id, and `id@variant` for each variant."""
        profile = self._by_id.get(model_id)
        variants = () if profile is None or not profile.variants else profile.choices
        return model_id, *(choice.requested.name for choice in variants)

    @property
    def has_variants(self) -> bool:
        return bool(self._variants)

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
