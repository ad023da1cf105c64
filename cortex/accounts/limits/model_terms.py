"""What requests for each model are measured with, from the catalogue in force."""

from __future__ import annotations

from collections.abc import Callable

from cortex.accounts.limits.terms import Limits, ModelTerms
from cortex.accounts.prices import FREE, prices_of
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.model_tables import ModelLimit
from cortex.config.profile import ModelProfile

_NOTHING = ModelLimit()


class ModelTermsTable:
    """The terms of each model. `served_context`: tokens of context of the engines that serve it, None without one."""

    def __init__(self, live: LiveConfig, served_context: Callable[[str], int | None]) -> None:
        self._live = live
        self._served_context = served_context
        self._made_from: Catalogue | None = None
        self._known: dict[str, ModelTerms] = {}
        self._limited: frozenset[str] = frozenset()

    @property
    def limited(self) -> frozenset[str]:
        """The ids of models that limit all callers together."""
        self._update()
        return self._limited

    def __call__(self, model_id: str) -> ModelTerms:
        self._update()
        terms = self._known.get(model_id)
        if terms is None:
            return ModelTerms(context=self._served_context(model_id))
        if terms.context is None:
            return ModelTerms(terms.limits, self._served_context(model_id), terms.output, terms.prices)
        return terms

    def _update(self) -> None:
        catalogue = self._live.catalogue
        if catalogue is not self._made_from:
            self._made_from = catalogue
            self._known = {profile.id: _terms(catalogue, profile) for profile in catalogue.models}
            self._limited = frozenset(name for name, terms in self._known.items() if not terms.limits.unlimited)


def _terms(catalogue: Catalogue, profile: ModelProfile) -> ModelTerms:
    limit = profile.limit or _NOTHING
    lengths = [choice.max_model_len for choice in profile.choices]
    tokens = [length for length in lengths if isinstance(length, int)]
    context = max(tokens) if tokens and len(tokens) == len(lengths) else limit.context
    prices = prices_of(catalogue, profile) or FREE
    return ModelTerms(Limits(limit.rpm, limit.tpm, limit.parallel), context, limit.output, prices)
