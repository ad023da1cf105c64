"""The small issuer of the tests, and a cortex that trusts it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer


@pytest.fixture
async def issuer() -> AsyncIterator[SmallIssuer]:
    async with SmallIssuer().running() as issuer:
        yield issuer
