"""Who keeps the lease on a load, and loads without one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from aiohttp import web

from cortex.fleet.load_leases import keeper_of
from cortex.fleet.snapshot import NodeSnapshot
from tests.cortex.conftest import StartCortex
from tests.cortex.fleets import fleet, host
from tests.cortex.protocol_v1_neuron import V1Neuron

MODELS = [f"org/m{number}" for number in range(30)]


def named(node: NodeSnapshot, name: str) -> NodeSnapshot:
    return replace(node, name=name)


def test_every_cortex_asks_the_same_neuron() -> None:
    """Whatever it calls the neurons, and whatever their order is. Models are spread over them."""
    a, b, c = (host(name, 24000) for name in "abc")
    keepers = [keeper_of(model, fleet(a, b, c)) for model in MODELS]
    other = [keeper_of(model, fleet(named(c, "x"), named(a, "y"), named(b, "z"))) for model in MODELS]
    assert [{"x": "c", "y": "a", "z": "b"}[name or ""] for name in other] == keepers
    assert set(keepers) == {"a", "b", "c"}


def test_where_there_is_nothing_to_agree_on() -> None:
    """A single neuron joins loads itself; protocol v1 has no leases; a neuron that is down does not answer."""
    a, b = host("a", 24000), host("b", 24000)
    v1 = host("v1", 24000, protocol_v1=True)
    assert keeper_of("m", fleet(a)) is None
    assert keeper_of("m", fleet(v1, named(v1, "v2"))) is None
    assert keeper_of("m", fleet(a, replace(b, healthy=False))) is None
    assert {keeper_of(model, fleet(a, v1, replace(b, healthy=False))) for model in MODELS} == {"a"}


class Keeper(V1Neuron):
    """A neuron with an instance id whose leases are the test's business."""

    def __init__(self, name: str, *vram_total_mb: int) -> None:
        super().__init__(name, *vram_total_mb)
        self.hangs = False
        self.leases: list[object] = []

    async def _discovery(self, request: web.Request) -> web.Response:
        found = await super()._discovery(request)
        assert isinstance(found.text, str)
        return web.json_response({**json.loads(found.text), "instance_id": f"{self.name}-1", "leases": True})

    def _routes(self) -> list[web.RouteDef]:
        return [*super()._routes(), web.post("/models/lease", self._lease)]

    async def _lease(self, request: web.Request) -> web.Response:
        self.leases.append(await request.json())
        if self.hangs:
            await asyncio.Event().wait()
        return web.json_response({"error": "no such route"}, status=404)


async def test_a_load_goes_on_without_a_lease(start_cortex: StartCortex) -> None:
    """Its keeper refuses, or hangs."""
    for hangs in (False, True):
        keepers = Keeper("a", 24000), Keeper("b", 24000)
        async with keepers[0].running(), keepers[1].running():
            for each in keepers:
                each.hangs = hangs
            cortex = await start_cortex(keepers, [{"id": "org/m"}], poll={"timeout_secs": 5})
            async with cortex.chat("org/m") as response:
                assert response.status == 200
            assert sum(len(each.loads) for each in keepers) == 1
            assert any(each.leases for each in keepers)
