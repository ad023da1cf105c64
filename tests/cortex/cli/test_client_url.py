"""What people give as the address of a cortex."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cortex.cli.client import CallFailed, call
from tests.certificates import authority_file, pair
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron


@pytest.mark.parametrize("form", ["{url}", "{url}/", "{url}/v1", "{url}/v1/", "{address}", "{address}/v1"])
async def test_address_is_understood_as_people_paste_it(start_cortex: StartCortex, benjy: V1Neuron, form: str) -> None:
    """With or without a scheme, a slash at the end, or the /v1 of an OpenAI client's base URL."""
    cortex = await start_cortex([benjy], [{"id": "m"}])
    given = form.format(url=cortex.url, address=cortex.url.removeprefix("http://"))
    fleet = await asyncio.to_thread(call, given, "GET", "/fleet", api_key=None, timeout_secs=5)
    assert "nodes" in fleet


async def test_https(
    start_cortex: StartCortex, benjy: V1Neuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authorities are those of CORTEX_CA, or the system's. Each failure says what to set."""
    cortex = await start_cortex([benjy], [{"id": "m"}], gateway=pair(tmp_path).gateway)

    async def ask(url: str) -> str:
        try:
            return str(await asyncio.to_thread(call, url, "GET", "/fleet", api_key=None, timeout_secs=5))
        except CallFailed as error:
            return str(error)

    assert "not trusted" in (answer := await ask(cortex.url))
    assert "set CORTEX_CA" in answer
    assert "use https:// instead of http://" in await ask(cortex.url.replace("https", "http"))
    monkeypatch.setenv("CORTEX_CA", str(authority_file(tmp_path)))
    assert "benjy" in await ask(cortex.url)
    assert "TLS fails" in await ask(cortex.metrics_url.replace("http", "https"))
    monkeypatch.setenv("CORTEX_CA", str(tmp_path / "key.pem"))
    assert "CORTEX_CA: " in await ask(cortex.url)
