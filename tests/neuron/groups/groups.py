"""Two neurons and an engine that spans them, loaded as cortex does."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.neuron.neurons import Answer, Client

MODEL = "org/wide"


async def checked_group(group: str, clients: list[Client]) -> dict[str, Any]:
    """Has the neurons listen and reach one another; the master address and port."""
    heard = [(await client.call("POST", "/groups/listen", json={"group": group})).body for client in clients]
    for rank, client in enumerate(clients):
        peers = [{"node": str(other), **at} for other, at in enumerate(heard) if other != rank]
        answer = await client.call("POST", "/groups/reach", json={"group": group, "peers": peers})
        assert answer.body == {"unreachable": {}}
    return {"master_addr": heard[0]["address"], "master_port": heard[0]["port"]}


async def load_parts(group: str, clients: list[Client], *args: str, **fields: Any) -> list[Answer]:
    """Loads every part, rank 0 first, and waits for all."""
    at = await checked_group(group, clients)
    parallel = {"tensor": len(clients)}

    def part(rank: int) -> dict[str, Any]:
        told = {"id": group, "rank": rank, "size": len(clients), **at}
        return {"group": told, "parallel": parallel, "vram_mb": 4000, **fields}

    for rank, client in enumerate(clients):
        assert (await client.load(MODEL, *args, wait=False, **part(rank))).status == 202
    waiting = (client.load(MODEL, *args, **part(rank)) for rank, client in enumerate(clients))
    return list(await asyncio.gather(*waiting))


async def begin_part(client: Client, model: str, group: str, rank: int, at: dict[str, Any]) -> Answer:
    """Has a neuron accept one part of an engine over two neurons, on its device 0."""
    told = {"id": group, "rank": rank, "size": 2, **at}
    fields = {"group": told, "parallel": {"tensor": 2}, "vram_mb": 4000, "devices": [0]}
    return await client.load(model, wait=False, **fields)
