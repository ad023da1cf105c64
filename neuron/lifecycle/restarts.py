"""When an engine that died is started again, and when no more. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from neuron.config import RecoverySettings


@dataclass(frozen=True)
class Restarts:
    """The failures of one engine in a row."""

    settings: RecoverySettings
    failures: int = 0

    def after_failure(self, served_secs: float | None) -> Restarts:
        """With one more failure. `served_secs`: how long the engine had served, None when it never came up; one that
        served long enough begins a new row."""
        stable = served_secs is not None and served_secs >= self.settings.stable_secs
        return Restarts(self.settings, 1 if stable else self.failures + 1)

    @property
    def given_up(self) -> bool:
        return self.failures >= self.settings.max_failures

    @property
    def pause_secs(self) -> float:
        """Before the next start: none after the first failure, then `backoff_secs`, doubling up to the greatest."""
        if self.failures <= 1:
            return 0.0
        doublings = min(self.failures - 2, 32)  # more would not change the result, and overflow in the end
        return min(self.settings.backoff_secs * 2.0**doublings, self.settings.max_backoff_secs)
