"""When an engine that failed is restarted, and when it is given up. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from neuron.config import RecoverySettings


@dataclass(frozen=True)
class Restarts:
    """Consecutive failures of a model's engine, and what follows from them. Pure."""

    settings: RecoverySettings
    failures: int = 0

    def after_failure(self, served_secs: float | None) -> Restarts:
        """Counts one more failure. `served_secs`: how long the engine served, None when it never came up. The count
        starts over after an engine that served for `stable_secs`."""
        stable = served_secs is not None and served_secs >= self.settings.stable_secs
        return Restarts(self.settings, 1 if stable else self.failures + 1)

    @property
    def given_up(self) -> bool:
        return self.failures >= self.settings.max_failures

    @property
    def pause_secs(self) -> float:
        """Delay before the next start: 0 after the first failure, then `backoff_secs`, doubled up to
        `max_backoff_secs`."""
        if self.failures <= 1:
            return 0.0
        doublings = min(self.failures - 2, 32)  # 2**32 is above any maximum, and more would overflow a float
        return min(self.settings.backoff_secs * 2.0**doublings, self.settings.max_backoff_secs)
