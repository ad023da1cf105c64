"""A `POST` to `/v1/responses`: its answer may be stored by the engine, and it may continue a stored one."""

from __future__ import annotations

from functools import partial

import msgspec

from cortex.accounts.caller import Caller
from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.body.model_field import previous_response_id
from cortex.proxy.context import ProxyContext
from cortex.proxy.progress.state import Resolving
from cortex.proxy.relay import Relay
from cortex.proxy.translation.translatable_request import TranslatableRequest
from cortex.routing.replica import Refusal, Replica
from cortex.routing.response_owners import UNSTORED
from cortex.upstream.address import Address


class NewResponse(TranslatableRequest):
    """Goes to the engine that has the previous response, if the request names one that is known."""

    __slots__ = ("_continues",)

    def __init__(self, context: ProxyContext, client: ClientConnection, request: Request, caller: Caller) -> None:
        super().__init__(context, client, request, caller)
        self._continues = False  # sent to the engine that has the previous response

    def refused(self, status: int, refusal: Refusal) -> bool:
        """Another engine would only say that it does not have the previous response: the client can retry."""
        if self._continues and not self._failures and refusal in ("unavailable", "dead"):
            return False
        return super().refused(status, refusal)

    def _route(self, name: str, model_id: str) -> None:
        only_one = len(self._context.control.table.get(name, ())) == 1
        previous = None if only_one else previous_response_id(self._request.body)
        if previous is None or previous.startswith(UNSTORED):
            super()._route(name, model_id)
            return
        maker = self._context.published_maker(previous)
        if maker is None:
            self._state = Resolving(self._spawn(self._find_maker(previous, name, model_id), "maker for"))
        else:
            self._continue(maker, name, model_id)

    async def _find_maker(self, previous: str, name: str, model_id: str) -> None:
        maker = await self._context.find_maker(previous)
        self._resolved()
        self._continue(maker, name, model_id)

    def _continue(self, maker: Replica | None, name: str, model_id: str) -> None:
        """Without the engine that made the previous response, any other says that it does not have it."""
        other_variant = name != model_id and maker is not None and not self._is_among(name, maker)
        if maker is None or maker.requested_id != model_id or other_variant:
            super()._route(name, model_id)
            return
        self._continues = True
        self._send(msgspec.structs.replace(maker, limit=None), compared=False)

    def _is_among(self, name: str, maker: Replica) -> bool:
        return any(each.url == maker.url for each in self._context.control.table.get(name, ()))

    def _new_relay(self, replica: Replica, address: Address, head: bytes, answer: Answer) -> Relay:
        relay = super()._new_relay(replica, address, head, answer)
        if self._translation is None:
            relay.on_start = partial(self._context.learn_owner, replica)
        return relay
