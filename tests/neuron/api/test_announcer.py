"""How neuron announces itself: the URL that it gives, and what it makes of a failure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp
import pytest

from neuron.api.announcer import Announcer, endpoint_towards
from neuron.api.dialling import shown
from neuron.config import NeuronConfig
from shared import tasks
from shared.protocol import RegistrationReply

HERE, THERE = "10.0.0.1", "10.0.0.2"


def config(host: str) -> NeuronConfig:
    return NeuronConfig.model_validate({"host": host})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_is_not_announced_to_another_host(host: str) -> None:
    """A cortex there would ask itself. One on this host may use it, whichever of its addresses was given."""
    with pytest.raises(ValueError, match="set host"):
        endpoint_towards(config(host), 13131, HERE, THERE)
    shown_host = f"[{host}]" if ":" in host else host
    for here in (HERE, "127.0.0.1"):
        assert endpoint_towards(config(host), 13131, here, here) == f"http://{shown_host}:13131"


def test_a_wildcard_is_announced_as_the_address_of_the_connection() -> None:
    assert endpoint_towards(config("0.0.0.0"), 13131, HERE, THERE) == f"http://{HERE}:13131"
    assert endpoint_towards(config("gpu1"), 13131, HERE, THERE) == "http://gpu1:13131"


def test_of_an_error_the_message_is_shown() -> None:
    """Another server's answer is shown as it is, but not all of it."""
    assert shown(b'{"error": {"message": "taken", "code": "neuron_name_taken"}}') == "taken"
    for other in (b"<html>no</html>", b'{"error": "no"}', b"[]"):
        assert shown(other) == other.decode()
    assert len(shown(b"x" * 4096)) == 500


async def test_announcements_go_on_after_an_unforeseen_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To every cortex: none of them may wait for a restart of neuron."""
    monkeypatch.setattr(tasks, "RESTART_DELAY_SECS", 0)
    tries: dict[str, int] = {}
    again = asyncio.Event()
    settings = {"urls": ["http://a:1", "http://b:1"], "token_file": "token", "interval_secs": 0.1}

    class Failing(Announcer):
        async def _announce(self, url: str, accepted: Callable[[RegistrationReply], None]) -> str | None:
            tries[url] = tries.get(url, 0) + 1
            if len(tries) == 2 and min(tries.values()) > 1:
                again.set()
            raise RuntimeError("unforeseen")

    async with aiohttp.ClientSession() as http:
        announcer = Failing(NeuronConfig.model_validate({"cortex": settings}), http, port=1, instance_id="x")
        task = asyncio.create_task(announcer.run())
        with caplog.at_level(logging.CRITICAL):
            await again.wait()
        await tasks.cancel_all([task])
    assert min(tries.values()) > 1
