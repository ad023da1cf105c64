"""A request whose body is a multipart form on disk."""

from __future__ import annotations

from cortex.accounts.caller import Caller
from cortex.config.aliases import Rewrite
from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.body.model_field import MissingModel
from cortex.proxy.context import ProxyContext
from cortex.proxy.request_handler import RequestHandler
from cortex.proxy.request_kinds.spooled_form import SpooledForm
from shared.errors import ServiceError


class SpooledUpload(RequestHandler):
    """Goes to an engine as any other request: once the form is complete, and again if that engine fails."""

    __slots__ = ("_form",)

    def __init__(
        self, context: ProxyContext, client: ClientConnection, request: Request, caller: Caller, *, form: SpooledForm
    ) -> None:
        super().__init__(context, client, request, caller)
        self._form = form

    def begin(self) -> None:
        try:
            model, named = self._named_model()
        except ServiceError as error:
            self._refuse_unnamed(error)
            return
        self._account.asked = model
        rewrite = self._context.control.aliases.get(model) or Rewrite(model, model)
        if rewrite.model_id != named or rewrite.edits is not None:
            self._form.rewrite(rewrite)
        self._admit(rewrite.name, rewrite.model_id)

    def _named_model(self) -> tuple[str, str | None]:
        """The model to use, and the one that the form names."""
        try:
            model = self._form.model()
        except MissingModel:
            if self._context.default_model is None:
                raise
            return self._context.default_model, None
        return model, model
