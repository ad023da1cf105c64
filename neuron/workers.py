"""All models of this host: finds or makes the worker of each, and speaks of all of them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from neuron import failures
from neuron.config import NeuronConfig
from neuron.events import EventHub
from neuron.launcher import Launcher
from neuron.metrics import NeuronMetrics
from neuron.run import Run
from neuron.spec import spec_of
from neuron.worker import State, Worker
from shared.protocol import LoadCommand, ModelView


class NeuronModelView(ModelView):
    """What this neuron says beyond the protocol: `state` tells stopping from unloaded, `pid` leads to the engine."""

    state: str
    pid: int | None = None


class Workers:
    """The workers by model id. A model once asked for stays known, with its spec, while this process lives."""

    def __init__(self, config: NeuronConfig, launcher: Launcher, hub: EventHub, metrics: NeuronMetrics) -> None:
        self._config = config
        self._launcher = launcher
        self._hub = hub
        self._metrics = metrics
        self._workers: dict[str, Worker] = {}
        self._stopping = False

    @property
    def all(self) -> Sequence[Worker]:
        return list(self._workers.values())

    def get(self, model_id: str) -> Worker:
        """The worker of a known model.

        Raises:
            NotFound: nobody ever asked for it.
        """
        worker = self._workers.get(model_id)
        if worker is None:
            raise failures.unknown_model(model_id)
        return worker

    async def load(self, command: LoadCommand) -> Run:
        """The run that loads the model, joined or new; wait with `Run.loaded`.

        Raises:
            InvalidRequest: a value is refused. Conflict: there with another spec. NotFound: a bare command for a
            model that was never loaded. Unavailable: this neuron is stopping, or its GPUs cannot be used.
        """
        if command.bare:
            self._refuse_when_stopping()
            return self._known_or_new(command.model_id).request(None)
        spec = spec_of(command, harnesses=self._config.harness_names)
        await self._launcher.check(spec)
        self._refuse_when_stopping()  # last, so that nothing starts after `stop_all` went through the list
        return self._known_or_new(spec.model_id).request(spec)

    async def unload(self, model_id: str) -> None:
        """Returns when the model's processes are gone and their memory is back.

        Raises:
            NotFound: the model is not known. VramNotReleased: the driver still counts memory as its own.
        """
        run = self.get(model_id).stop(failures.load_cancelled(model_id))
        if run is not None:
            await run.gone()

    async def views(self) -> list[NeuronModelView]:
        """Every known model, its memory measured now."""
        await self._launcher.measure([worker.engine for worker in self.all if worker.engine is not None])
        return self.views_now()

    def views_now(self) -> list[NeuronModelView]:
        """Every known model, its memory as last measured."""
        return [view_of(worker) for worker in self.all]

    def engine_urls(self) -> dict[str, str]:
        """Model id -> URL of the engines that are loaded."""
        return {
            worker.model_id: worker.engine.url
            for worker in self.all
            if worker.engine is not None and worker.condition.state is State.LOADED
        }

    def refuse_loads(self) -> None:
        """From now on no load begins; those that are running end, and who waits for one is told at once."""
        self._stopping = True
        for worker in self.all:
            worker.give_up_load(failures.stopping())

    async def stop_all(self) -> None:
        """Ends every engine, all at the same time. Returns when nothing of them is left."""
        self.refuse_loads()
        runs = [worker.stop(failures.stopping()) for worker in self.all]
        await asyncio.gather(*(run.gone() for run in runs if run is not None), return_exceptions=True)

    def kill_all_now(self) -> None:
        """For an exit that waits for nothing."""
        self._launcher.kill_all_now()

    def _known_or_new(self, model_id: str) -> Worker:
        return self._workers.get(model_id) or Worker(model_id, self._launcher, self._changed, self._metrics.loaded)

    def _changed(self, worker: Worker) -> None:
        if worker.model_id not in self._workers:  # known from its first change on, not from a request that was refused
            self._workers[worker.model_id] = worker
            self._metrics.known(worker.model_id)
        self._hub.publish("model", view_of(worker).model_dump_json())

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise failures.stopping()


def view_of(worker: Worker) -> NeuronModelView:
    """A worker as `/models` and the events show it. `vram_used_mb` is as last measured."""
    condition, engine, spec = worker.condition, worker.engine, worker.spec
    progress = condition.progress
    if progress is not None:
        progress = progress.model_copy(update={"elapsed_secs": round(time.time() - condition.since, 3)})
    return NeuronModelView(
        id=worker.model_id,
        harness=None if spec is None else spec.harness,
        status=condition.state.status.value,
        devices=[] if engine is None else list(engine.devices),
        vram_used_mb=0 if engine is None else engine.vram_used_mb,
        progress=progress,
        error=condition.error,
        since=condition.since,
        tensor_parallel=None if spec is None else spec.tensor_parallel,
        state=condition.state.value,
        pid=None if engine is None else engine.process.pid,
    )
