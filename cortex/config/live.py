"""The current configuration. Read it on each use and do not keep a reference: it may be replaced at any time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from shared.subscribers import Subscribers


class LiveConfig:
    """Holds the configuration and the catalogue, which change together. `loaded_at` is Unix time, `files` are the
    source files, `networks` those of the neurons for which something is configured, and `error` is why the files'
    current content is not in effect, None when it is."""

    def __init__(self, config: CortexConfig, catalogue: Catalogue, files: Sequence[str] = ()) -> None:
        self.config = config
        self.networks = config.networks()
        self.catalogue = catalogue
        self.files = tuple(files)
        self.loaded_at = time.time()
        self.error: str | None = None
        self.changes: Subscribers[[]] = Subscribers()

    def replace(self, config: CortexConfig, catalogue: Catalogue, files: Sequence[str]) -> None:
        """Puts a new configuration into effect. Pass the same object for an unchanged part: subscribers may compare
        by identity."""
        changed = config is not self.config or catalogue is not self.catalogue
        self.config = config
        self.networks = config.networks()
        self.catalogue = catalogue
        self.files = tuple(files)
        self.loaded_at = time.time()
        self.error = None
        if changed:
            self.changes.announce()

    def refuse(self, error: str) -> None:
        """Records that the files are invalid; the current configuration stays in effect."""
        self.error = error
