"""How neuron puts an engine to sleep: its weights leave the GPU, its process stays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import aiohttp


class SleepControl(ABC):
    """Talks to engines of one kind through their sleep routes. `url` is where neuron reaches the engine; `control_key`
    is the secret that only neuron and this engine know."""

    weights_in_ram: bool = True
    """The weights of a sleeping engine take memory of this host."""

    @abstractmethod
    async def sleep(self, http: aiohttp.ClientSession, url: str, control_key: str, *, level: int) -> None:
        """Returns when the engine sleeps; requests that are running are finished first.

        Raises:
            Conflict: `sleep_unsupported`, or `model_busy`; the engine continues as before.
            SleepFailed: it does not sleep and continues as before. SleepUnsettled: it may be falling asleep: kill it.
        """

    @abstractmethod
    async def wake(self, http: aiohttp.ClientSession, url: str, control_key: str) -> None:
        """Returns when the engine serves; immediately when it is awake.

        Raises:
            WakeFailed: it does not serve, and what it holds is unknown: kill it.
        """

    @abstractmethod
    async def is_sleeping(self, http: aiohttp.ClientSession, url: str, control_key: str) -> bool | None:
        """Whether the engine sleeps; None when it does not answer in time."""

    @abstractmethod
    async def is_guarded(self, http: aiohttp.ClientSession, url: str, control_key: str) -> bool:
        """True when the engine accepts `control_key` and nothing else; False when it accepts nothing, so it cannot
        sleep.

        Raises:
            GuardFailed: it accepts callers without the key, so it must not serve.
        """

    def weights_mb(self, lines: Sequence[str], ranks: int) -> int | None:
        """MiB of weights on all `ranks` devices together, from the output of the load; None when it does not say."""
        return None
