"""A `POST` to `/v1/responses` or below: the engine may store its answer, and it may continue a stored one."""

from __future__ import annotations

from functools import partial

import msgspec

from cortex.accounts.caller import Caller
from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.body.model_field import chooses_response_id, previous_response_id
from cortex.proxy.context import ProxyContext
from cortex.proxy.progress.state import Resolving
from cortex.proxy.relay import Relay
from cortex.proxy.request_handler import RequestHandler
from cortex.proxy.translation.translatable_request import TranslatableRequest
from cortex.routing.replica import Refusal, Replica
from cortex.routing.response_owners import UNSTORED, ResponseMaker, unknown_response
from cortex.upstream.address import Address
from shared.errors import InvalidRequest


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
        context, caller, body = self._context, self._account.caller, self._request.body
        may_use_all = context.may_use_all_responses(caller)
        if not may_use_all and chooses_response_id(body):
            self._refuse(_not_its_id())
            return
        only_one = may_use_all and len(context.control.table.get(name, ())) == 1
        previous = None if only_one else previous_response_id(body)
        if previous is None or previous.startswith(UNSTORED):
            super()._route(name, model_id)
            return
        maker = context.published_maker(previous, caller)
        if maker is None:
            self._state = Resolving(self._spawn(self._find_maker(previous, name, model_id), "maker for"))
        else:
            self._continue(maker, name, model_id)

    async def _find_maker(self, previous: str, name: str, model_id: str) -> None:
        context, caller = self._context, self._account.caller
        known = await context.find_maker(previous, caller)
        if known is None and not context.may_use_all_responses(caller):
            raise unknown_response(previous, param="previous_response_id")
        maker = None if known is None else await context.loaded_maker(known)
        self._resolved()
        self._continue(maker, name, model_id)

    def _continue(self, maker: Replica | None, name: str, model_id: str) -> None:
        """Without the engine that made the previous response, any other says that it does not have it."""
        other_variant = name != model_id and maker is not None and not self._is_among(name, maker)
        if maker is None or maker.requested_id != model_id or other_variant:
            super()._route(name, model_id)
            return
        self._continues, self._account.choice = True, "maker"
        self._send(msgspec.structs.replace(maker, limit=None), compared=False)

    def _is_among(self, name: str, maker: Replica) -> bool:
        return any(each.url == maker.url for each in self._context.control.table.get(name, ()))

    def _new_relay(self, replica: Replica, address: Address, head: bytes, answer: Answer) -> Relay:
        relay = super()._new_relay(replica, address, head, answer)
        if self._translation is None:
            maker = ResponseMaker(replica, self._account.key_id)
            relay.on_start = partial(self._context.learn_owner, maker)
        return relay


class RelatedResponse(RequestHandler):
    """A `POST` below `/v1/responses`. Goes to any engine of its model."""

    __slots__ = ()

    def _route(self, name: str, model_id: str) -> None:
        previous = _to_be_checked(self._context, self._account.caller, self._request.body)
        if previous is None:
            super()._route(name, model_id)
        else:
            self._state = Resolving(self._spawn(self._check(previous, name, model_id), "maker for"))

    async def _check(self, previous: str, name: str, model_id: str) -> None:
        await _check_previous(self._context, self._account.caller, previous)
        self._resolved()
        super()._route(name, model_id)


class TranslatableRelatedResponse(TranslatableRequest):
    """One whose path can be translated, such as `compact`. A class of its own: compiled, none has two bases."""

    __slots__ = ()

    def _route(self, name: str, model_id: str) -> None:
        previous = _to_be_checked(self._context, self._account.caller, self._request.body)
        if previous is None:
            super()._route(name, model_id)
        else:
            self._state = Resolving(self._spawn(self._check(previous, name, model_id), "maker for"))

    async def _check(self, previous: str, name: str, model_id: str) -> None:
        await _check_previous(self._context, self._account.caller, previous)
        self._resolved()
        super()._route(name, model_id)


def _to_be_checked(context: ProxyContext, caller: Caller, body: bytes) -> str | None:
    """The previous response that the body names, if this caller may not use all. An id that cortex made for a chat's
    answer needs no check: no engine has it."""
    previous = None if context.may_use_all_responses(caller) else previous_response_id(body)
    return None if previous is None or previous.startswith(UNSTORED) else previous


async def _check_previous(context: ProxyContext, caller: Caller, previous: str) -> None:
    """Raises NotFound unless the caller may use this response."""
    if await context.find_maker(previous, caller) is None:
        raise unknown_response(previous, param="previous_response_id")


def _not_its_id() -> InvalidRequest:
    return InvalidRequest(
        "'request_id' would choose the id of the response, which could be another client's: leave it out",
        param="request_id",
    )
