"""Routes for engines that span several neurons: the check of the network between them, before their load."""

from __future__ import annotations

from aiohttp import web

from neuron.api.app_keys import SERVICES, called_at
from neuron.lifecycle.group_network import unreachable
from shared.http import read_model, reply
from shared.protocol import ListenCommand, ReachCommand, ReachReply


async def listen(request: web.Request) -> web.Response:
    """By default the others come to the address at which the caller has."""
    command = await read_model(request, ListenCommand)
    return reply(await request.app[SERVICES].group_listeners.listen(command.group, called_at(request)))


async def reach(request: web.Request) -> web.Response:
    command = await read_model(request, ReachCommand)
    return reply(ReachReply(unreachable=await unreachable(command.group, command.peers)))


def add_routes(app: web.Application) -> None:
    app.router.add_post("/groups/listen", listen)
    app.router.add_post("/groups/reach", reach)
