"""What the tests of the owners of limits share: keys, terms of a model, a clock."""

from __future__ import annotations

import pytest

from cortex.accounts.caller import Caller
from cortex.accounts.limits.exceeded import LimitExceeded
from cortex.accounts.limits.limiter import LimitOwner
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.terms import Budget, Grant, TokenBound
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig

ALICE, BOB = Caller("a", "alice", limited=True), Caller("b", "bob", limited=True)
SMALL = TokenBound(10, 10)
DAY = Budget(100, "tokens", "day")


def terms(**limit: int) -> ModelTermsTable:
    catalogue = Catalogue.model_validate({"models": [{"id": "org/m", "limit": {"context": 1000, **limit}}]})
    return ModelTermsTable(LiveConfig(CortexConfig(), catalogue), lambda _: None)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def refused(limiter: LimitOwner, caller: Caller = ALICE, bound: TokenBound = SMALL) -> LimitExceeded:
    with pytest.raises(LimitExceeded) as caught:
        limiter.admit(caller, "org/m", bound)
    return caught.value


def granted(limiter: LimitOwner, caller: Caller = ALICE, model: str = "org/m", bound: TokenBound = SMALL) -> Grant:
    grant = limiter.admit(caller, model, bound)
    assert grant is not None
    return grant
