"""What models' tokens cost. Pure. Not compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

from typing import Final

import msgspec

from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.profile import ModelProfile


class Prices(msgspec.Struct, frozen=True, gc=False):
    """What a million tokens of a model cost. `cached_input`: those of the prompt that the engine had in its cache."""

    input: float = 0.0
    cached_input: float = 0.0
    output: float = 0.0

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float:
        """Of one request. `prompt` includes `cached`."""
        return ((prompt - cached) * self.input + cached * self.cached_input + completion * self.output) / 1e6


FREE: Final = Prices()


class PriceList(msgspec.Struct, frozen=True):
    """What the models' tokens cost, by model id; models without a price are left out."""

    currency: str
    prices: dict[str, Prices]


NO_PRICES: Final = PriceList("", {})


def price_list(live: LiveConfig) -> PriceList:
    """The prices of the catalogue in force."""
    catalogue = live.catalogue
    found = {profile.id: prices_of(catalogue, profile) for profile in catalogue.models}
    priced = {model_id: prices for model_id, prices in found.items() if prices is not None}
    return PriceList(live.config.usage.currency, priced)


def prices_of(catalogue: Catalogue, profile: ModelProfile) -> Prices | None:
    """A model's prices, None if it has none. An adapter without its own has those of its base."""
    given = profile.prices
    if given is None and profile.base is not None:
        base = catalogue.profile(profile.base)
        given = None if base is None else base.prices
    if given is None:
        return None
    return Prices(given.input, given.input if given.cached_input is None else given.cached_input, given.output)
