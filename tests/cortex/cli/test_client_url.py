"""What people give as the address of a cortex."""

from __future__ import annotations

import asyncio

import pytest

from cortex.cli.client import call
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron


@pytest.mark.parametrize("form", ["{url}", "{url}/", "{url}/v1", "{url}/v1/", "{address}", "{address}/v1"])
async def test_address_is_understood_as_people_paste_it(start_cortex: StartCortex, benjy: V1Neuron, form: str) -> None:
    """With or without a scheme, a slash at the end, or the /v1 of an OpenAI client's base URL."""
    cortex = await start_cortex([benjy], [{"id": "m"}])
    given = form.format(url=cortex.url, address=cortex.url.removeprefix("http://"))
    fleet = await asyncio.to_thread(call, given, "GET", "/fleet", api_key=None, timeout_secs=5)
    assert "nodes" in fleet
