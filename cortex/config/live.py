"""The configuration that holds now. Read it where it is used, never keep it: it may be another the next moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig

Subscriber = Callable[[], None]


class LiveConfig:
    """Owns configuration and catalogue; both change together. `loaded_at` is Unix time, `files` are where they came
    from, and `error` is why what stands there now is not in use, None when it is."""

    def __init__(self, config: CortexConfig, catalogue: Catalogue, files: Sequence[str] = ()) -> None:
        self.config = config
        self.catalogue = catalogue
        self.files = tuple(files)
        self.loaded_at = time.time()
        self.error: str | None = None
        self._subscribers: list[Subscriber] = []

    def replace(self, config: CortexConfig, catalogue: Catalogue, files: Sequence[str]) -> None:
        """Another configuration holds from now on. An object that says the same as before had better be the same one:
        subscribers may compare by identity."""
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
        """What stands in the files cannot be used: what held before holds on."""
        self.error = error

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` after each change. The result ends the subscription."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)
