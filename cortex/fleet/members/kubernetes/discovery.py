"""Finds neurons by the labels of their pods. Pods and not the endpoints of a Service: a pod says which node it is on
and that it is gone, and needs no Service."""

from __future__ import annotations

import asyncio
import contextlib

from cortex.config.discovery import DiscoverySettings
from cortex.fleet.members.found import FoundNeurons
from cortex.fleet.members.kubernetes.pod_api import PodApi, PodChange, PodsUnavailable, WatchExpired
from cortex.fleet.members.kubernetes.pods import NO_PODS, Pods, after_change, endpoints
from shared.tasks import TaskSet

PAUSE_SECS = 1.0
"""Between two watches, should the API end each one at once."""


class KubernetesDiscovery:
    """Owns the list of pods. A deleted pod's neuron leaves at once; while the API does not answer, none leaves."""

    def __init__(self, settings: DiscoverySettings, found: FoundNeurons, api: PodApi) -> None:
        self._settings = settings
        self._found = found
        self._api = api
        self._pods: Pods | None = None  # None: not listed yet
        self._version: str | None = None  # where the next watch begins; None: list first
        self._tasks = TaskSet()

    async def look(self) -> None:
        """Lists the pods and asks their neurons for names."""
        await self._list()
        await self.ask()

    async def ask(self) -> None:
        """Asks the neurons that have not said their names."""
        if self._pods is None:
            return
        nodes = endpoints(self._pods, port=self._settings.port, tls=self._settings.tls)
        empty = (
            f"no pod of the namespace {self._api.namespace!r} with the labels {self._api.selector!r} has an address: "
            "no neuron is found"
        )
        self._found.warn("pods", "" if nodes else empty)
        await self._found.use(nodes, hints={endpoint: node for endpoint, node in nodes.items() if node})

    async def ask_loop(self) -> None:
        """Asks again every `interval_secs`: those that did not answer, and those that have restarted. Never returns."""
        while True:
            await asyncio.sleep(self._settings.interval_secs)
            await self.ask()

    async def follow_loop(self) -> None:
        """Follows the pods. Never returns."""
        try:
            while True:
                if self._version is None:
                    await self._list()
                    self._ask_soon()
                goes_well = self._version is not None and await self._watch(self._version)
                await asyncio.sleep(PAUSE_SECS if goes_well else self._settings.interval_secs)
        finally:
            await self._tasks.close()

    async def _list(self) -> None:
        try:
            self._pods, self._version = await self._api.list()
        except PodsUnavailable as error:
            self._found.warn("API", str(error))
        else:
            self._found.warn("API", "")

    async def _watch(self, version: str) -> bool:
        """Follows one watch to its end. False: it was refused, or not answered."""
        try:
            async with contextlib.aclosing(self._api.changes(version)) as changes:
                async for change in changes:
                    self._apply(change)
        except WatchExpired:
            self._version = None
        except PodsUnavailable as error:
            self._version = None
            self._found.warn("watch", str(error))
            return False
        self._found.warn("watch", "")
        return True

    def _apply(self, change: PodChange) -> None:
        self._version = change.version
        if change.pod is not None:
            self._pods = after_change(self._pods or NO_PODS, change.kind, change.pod)
            self._ask_soon()

    def _ask_soon(self) -> None:
        """Not awaited: a neuron that is slow to say its name must not delay the news of other pods."""
        _ = self._tasks.spawn(self.ask(), name="names of found neurons")
