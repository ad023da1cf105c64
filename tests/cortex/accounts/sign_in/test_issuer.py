"""What cortex fetches from the issuer, while clients come and go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from cortex.accounts.sign_in.issuer import Issuer
from cortex.config.sign_in import OidcSettings
from shared.errors import Unavailable
from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer


@dataclass
class SlowIssuer(SmallIssuer):
    """Says what it offers once `may_answer` is set; `asked_for_offer`: cortex waits for that. `answers`: with what it
    offers, or 500."""

    asked_for_offer: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    answers: bool = True

    async def discovery(self, request: web.Request) -> web.Response:
        self.asked_for_offer.set()
        await self.may_answer.wait()
        return await super().discovery(request) if self.answers else web.Response(status=500)


async def test_a_client_that_leaves_during_the_first_fetch() -> None:
    """The next one gets what was fetched for it, and the issuer is not asked again."""
    async with SlowIssuer().running() as issuer:
        assert isinstance(issuer, SlowIssuer)
        known = Issuer(OidcSettings.model_validate(issuer.settings()))
        leaving = asyncio.create_task(known.offer())
        await issuer.asked_for_offer.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        issuer.may_answer.set()
        assert (await known.offer()).issuer == issuer.url
        assert len(await known.known_keys()) == 1
        assert issuer.fetches == 1
        await known.close()


async def test_clients_that_wait_for_one_fetch() -> None:
    """If it fails, each of them is told why, also those that come right after it, and those that left do not matter."""
    async with SlowIssuer(answers=False).running() as issuer:
        assert isinstance(issuer, SlowIssuer)
        known = Issuer(OidcSettings.model_validate(issuer.settings()))
        waiting = [asyncio.create_task(known.offer()) for _ in range(3)]
        await issuer.asked_for_offer.wait()
        issuer.asked_for_offer.clear()
        waiting[0].cancel()
        issuer.may_answer.set()
        left, *others = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(left, asyncio.CancelledError)
        assert all(isinstance(other, Unavailable) and issuer.url in other.message for other in others)
        with pytest.raises(Unavailable, match="sign-in is unavailable: the issuer"):
            await known.offer()
        assert not issuer.asked_for_offer.is_set()
        await known.close()
