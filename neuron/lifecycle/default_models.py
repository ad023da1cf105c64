"""Loads the configured default models when neuron starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from neuron.lifecycle.registry import Registry
from neuron.spec import InstanceKey
from shared.errors import ServiceError
from shared.protocol import FIRST_INSTANCE, Activation, LoadCommand

log = logging.getLogger(__name__)


class DefaultModels:
    """Loads them one after the other: parallel loads would compete for the disk. A failure does not stop the others."""

    def __init__(self, registry: Registry, commands: Sequence[LoadCommand]) -> None:
        self._registry = registry
        self._commands = list(commands)
        self.progress = Activation(
            state="activating" if commands else "idle", pending=[_name_of(command) for command in commands]
        )

    async def load_all(self) -> None:
        for command in self._commands:
            name = _name_of(command)
            self._update(in_progress=name, pending=self.progress.pending[1:])
            try:
                # Who will use them is not known yet, and engines without a key serve everyone who may use this neuron.
                await (await self._registry.load(command, carries_keys=False)).loaded()
            except ServiceError as error:
                log.error("default model %s was not loaded: %s", name, error.message)  # noqa: TRY400
                reason = error.message.partition("\n")[0]
                self._update(in_progress=None, failed={**self.progress.failed, name: reason})
            else:
                self._update(in_progress=None, completed=[*self.progress.completed, name])
        if self._commands:
            self._update(state="done")

    def _update(self, **changes: object) -> None:
        self.progress = self.progress.model_copy(update=changes)


def _name_of(command: LoadCommand) -> str:
    return str(InstanceKey(command.model_id, command.instance or FIRST_INSTANCE))
