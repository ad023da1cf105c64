"""The current configuration. Read it on each use and do not keep a reference: it may be replaced at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig

Subscriber = Callable[[], None]


class LiveConfig:
    """Holds the configuration and the catalogue, which change together. `loaded_at` is Unix time, `files` are the
    source files, and `error` is why their current content is not in effect, None when it is."""

    def __init__(self, config: CortexConfig, catalogue: Catalogue, files: Sequence[str] = ()) -> None:
        self.config = config
        self.catalogue = catalogue
        self.files = tuple(files)
        self.loaded_at = time.time()
        self.error: str | None = None
        self._subscribers: list[Subscriber] = []

    def replace(self, config: CortexConfig, catalogue: Catalogue, files: Sequence[str]) -> None:
        """Puts a new configuration into effect. Pass the same object for an unchanged part: subscribers may compare
        by identity."""
        changed = config is not self.config or catalogue is not self.catalogue
        self.config = config
        self.catalogue = catalogue
        self.files = tuple(files)
        self.loaded_at = time.time()
        self.error = None
        if changed:
            for subscriber in list(self._subscribers):
                subscriber()

    def refuse(self, error: str) -> None:
        """Records that the files are invalid; the current configuration stays in effect."""
        self.error = error

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` after each change. Call the result to unsubscribe."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)
