"""What a model's tokens cost. Pure. Not compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

from typing import Final

import msgspec


class Prices(msgspec.Struct, frozen=True, gc=False):
    """What a million tokens of a model cost. `cached_input`: those of the prompt that the engine had in its cache."""

    input: float = 0.0
    cached_input: float = 0.0
    output: float = 0.0

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float:
        """Of one request. `prompt` includes `cached`."""
        return ((prompt - cached) * self.input + cached * self.cached_input + completion * self.output) / 1e6


FREE: Final = Prices()
