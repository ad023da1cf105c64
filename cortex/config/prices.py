"""What the tokens of a model cost, in models.toml."""

from __future__ import annotations

from pydantic import Field

from shared.settings import SettingsModel


class ModelPrices(SettingsModel):
    """`prices`: per million tokens, in `[usage] currency`. `cached_input`: those of the prompt that the engine had in
    its cache; None: as the others of the prompt."""

    input: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Tokens of the prompt."""
    cached_input: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Those of them that the engine had in its cache. Default: as `input`."""
    output: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Tokens of the answer, reasoning included."""
