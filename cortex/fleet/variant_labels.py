"""The variants of engines whose neurons do not report them. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from cortex.config.catalogue import NO_MODELS, Catalogue
from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot, by_instance
from shared.protocol import ModelView


def _unknown(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    return None


@dataclass(frozen=True)
class VariantLabels:
    """`infer` says in which of a model's variants a neuron has it that reports none."""

    catalogue: Catalogue = NO_MODELS
    infer: Callable[[ModelProfile, NodeSnapshot], str | None] = _unknown

    def on(self, view: ModelView, node: NodeSnapshot) -> ModelView:
        """The view with its variant, if the node is one that does not report it; the same object if nothing
        changes."""
        if node.has_instances or (view.variant is None and not self.catalogue.has_variants):
            return view
        profile = self.catalogue.profile(view.id)
        variant = None if profile is None else self.infer(profile, node)
        return view if variant == view.variant else view.model_copy(update={"variant": variant})

    def on_all(self, node: NodeSnapshot) -> NodeSnapshot:
        """The node with the variants of its engines; the same object if nothing changes."""
        views = [self.on(view, node) for view in node.views]
        if all(new is old for new, old in zip(views, node.views, strict=True)):
            return node
        return replace(node, models=MappingProxyType(by_instance(views)))
