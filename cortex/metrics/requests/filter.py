"""Which requests an operator asks for. Not compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cortex.metrics.requests.entries import FailedAttempt


class RequestFilter(msgspec.Struct, frozen=True):
    """None fits every request. `own`: the id of the only key whose requests the caller may see. `key`: the name or id
    of a key. `status`: of an answer, so no live request fits."""

    own: str | None = None
    model: str | None = None
    key: str | None = None
    node: str | None = None
    status: str | None = None

    def fits(
        self, key_id: str, key: str, models: Sequence[str], node: str, attempts: Sequence[FailedAttempt] | None
    ) -> bool:
        """Whether a request of this key, for a model of these names, fits, whatever its status. `node`: where its
        engine is; `attempts`: those before it."""
        return (
            self.own in (None, key_id)
            and (self.model is None or self.model in models)
            and self.key in (None, key_id, key)
            and (self.node in (None, node) or any(self.node == attempt.node for attempt in attempts or ()))
        )
