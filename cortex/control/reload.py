"""Reloads the configuration at run time: reads it, checks it and applies only the difference."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from cortex.config.catalogue import Catalogue
from cortex.config.diff import Difference, difference
from cortex.config.files import ConfigurationFiles, catalogue_problems, configuration_warnings
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from cortex.control.route_table import RouteTable
from cortex.fleet.members.membership import Membership
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from shared.settings import SettingsError
from shared.system.files import Stamp

log = logging.getLogger(__name__)

LOOK_SECS = 1.0
"""How often the files are checked for changes. A changed file is read once it has been stable for this long: it may be
written in pieces."""


@dataclass(frozen=True)
class Outlook:
    """What the files say now and a reload would do with them. With `errors` it would change nothing. `warnings` do not
    stop it; `restart` are the changes that wait for a restart."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()


class Reloader:
    """Reads the files again after a change, or on request."""

    def __init__(
        self,
        files: ConfigurationFiles,
        asked: asyncio.Event,
        *,
        live: LiveConfig,
        fleet: Fleet,
        membership: Membership,
        routes: RouteTable,
        state: StateFile,
        foreign_budgets: Callable[[str], list[str]],
        also_wrong: Callable[[CortexConfig], list[str]] = lambda _: [],
    ) -> None:
        """Set `asked` to have the files read now. `foreign_budgets`: what is wrong with the keys' budgets if prices are
        in this currency. `also_wrong`: what is wrong with other files that a configuration names; it may block."""
        self._files = files
        self._live = live
        self._fleet = fleet
        self._membership = membership
        self._routes = routes
        self._state = state
        self._foreign_budgets = foreign_budgets
        self._also_wrong = also_wrong
        self._asked = asked
        self._reading = asyncio.Lock()  # of two reloads at once the older must not undo the newer
        self._warned: frozenset[str] = frozenset()

    async def watch_loop(self) -> None:
        """Reloads on each change and whenever `asked` is set. Never returns."""
        ended = threading.Event()
        looking = threading.Thread(
            target=self._look, args=(asyncio.get_running_loop(), ended), name="configuration files", daemon=True
        )
        looking.start()
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                await self.reload()
        finally:
            ended.set()

    def _look(self, loop: asyncio.AbstractEventLoop, ended: threading.Event) -> None:
        """Runs in its own thread: a network file system that hangs must not block cortex."""
        last: tuple[Stamp, ...] | None = None
        while not ended.wait(LOOK_SECS):
            stamps = self._files.stamps()
            if stamps == last and self._files.differ_from_what_was_read(stamps):
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._asked.set)
            last = stamps

    async def reload(self) -> None:
        """Applies the files. If they contain an error nothing changes, and `live.error` says why."""
        async with self._reading:
            await self._reload()

    async def outlook(self) -> Outlook:
        """What a reload would do now. Changes nothing."""
        return await asyncio.to_thread(self._outlook, self._live.config, self._live.catalogue)

    def _outlook(self, config: CortexConfig, catalogue: Catalogue) -> Outlook:
        try:
            new_config, new_catalogue = self._files.look()
            found, warnings = self._compared(config, catalogue, new_config, new_catalogue)
        except SettingsError as error:
            return Outlook(errors=tuple(error.problems))
        warnings += self._also_wrong(new_config)
        return Outlook((), tuple(dict.fromkeys(warnings)), found.lines, found.restart)

    async def _reload(self) -> None:
        try:
            found, warnings = await asyncio.to_thread(self._compare, self._live.config, self._live.catalogue)
        except asyncio.CancelledError:
            self._asked.set()  # the files count as read, so that nothing else would apply them
            raise
        except SettingsError as error:
            self._refuse(error.problems)
        except Exception as error:
            log.exception("bug while reading the configuration")
            self._refuse([f"{type(error).__name__}: {error}"])
        else:
            for warning in warnings:
                if warning not in self._warned:
                    log.warning("%s", warning)
            self._warned = frozenset(warnings)
            self._apply(found)

    def _compare(self, config: CortexConfig, catalogue: Catalogue) -> tuple[Difference, list[str]]:
        """Runs off the event loop: a large catalogue takes a moment to read."""
        return self._compared(config, catalogue, *self._files.read())

    def _compared(
        self, config: CortexConfig, catalogue: Catalogue, new_config: CortexConfig, new_catalogue: Catalogue
    ) -> tuple[Difference, list[str]]:
        currency = new_config.usage.currency
        if currency != config.usage.currency:
            where = f"{self._files.path}: usage.currency = {currency!r}"
            foreign = [f"{where}: {problem}" for problem in self._foreign_budgets(currency)]
            if foreign:
                raise SettingsError(foreign)
        warnings = [
            *configuration_warnings(new_config, new_catalogue, self._files.path),
            *catalogue_problems(new_catalogue, new_config.models_path(self._files.path)),
        ]
        return difference(config, catalogue, new_config, new_catalogue), warnings

    def _refuse(self, problems: list[str]) -> None:
        for problem in problems:
            log.error("configuration not reloaded: %s", problem)
        self._live.refuse("\n".join(problems))
        self._fleet.notify()

    def _apply(self, found: Difference) -> None:
        """In one step: no reader sees half of it."""
        config = found.config
        others = self._membership.configure(config.neurons, config.poll)
        self._live.replace(config, found.catalogue, [str(path) for path in self._files.paths])
        self._routes.forget(others)
        log.info("configuration reloaded: %s", found)
        for line in found.restart:
            log.warning("configuration: %s takes effect after a restart", line)
        warn_of_absent(self._state, self._fleet, config)


def warn_of_absent(state: StateFile, fleet: Fleet, config: CortexConfig) -> None:
    """Warns of drained neurons that are not in the configuration. Not for a fleet whose neurons are found: they may yet
    come."""
    absent = sorted(set(state.drained) - fleet.snapshot().nodes.keys())
    if absent and not config.discovery.finds:
        log.warning(
            "drained neurons that are not in the configuration (`cortex resume NODE` drops one): %s", ", ".join(absent)
        )
