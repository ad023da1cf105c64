"""`/usage` of a real cortex: records arrive while it serves, also after its recorder was killed; who sees what."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
import tomli_w

from tests.cortex.cortex_process import TOP, CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL = "org/small"
KEYS = [{"name": "alice", "key": "secret-a"}, {"name": "bob", "key": "secret-b", "role": "viewer"}]


@pytest.fixture
async def cortex(tmp_path: Path, benjy: V1Neuron) -> AsyncIterator[CortexProcess]:
    """Serves a model for alice, a user, and bob, who may see all."""
    benjy.models = {MODEL: "loaded"}
    (tmp_path / "keys.toml").write_text(tomli_w.dumps({"keys": KEYS}), encoding="utf-8")
    models = [{"id": MODEL, "prices": {"input": 1.0, "output": 1.0}}]
    keys = {"file": str(tmp_path / "keys.toml")}
    async with cortex_process(tmp_path, [benjy], models, state_dir="state", keys=keys) as running:
        yield running


class Client:
    """A client with a key."""

    def __init__(self, http: aiohttp.ClientSession, url: str, key: str) -> None:
        self._http = http
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}

    async def chat(self) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        async with self._http.post(f"{self._url}/v1/chat/completions", json=body, headers=self._headers) as response:
            assert response.status == 200

    async def get(self, path: str, *, status: int = 200) -> Any:
        async with self._http.get(f"{self._url}{path}", headers=self._headers) as response:
            assert response.status == status, await response.text()
            return await response.json()

    async def until(self, requests: int) -> Any:
        """The report by key, once it has so many requests; the test's time-out is the deadline."""
        while True:
            usage = await self.get("/usage?group_by=key,model,day")
            if usage["totals"]["requests"] == requests:
                return usage


async def test_usage_is_reported_to_keys_that_may_see_it(cortex: CortexProcess) -> None:
    """A user sees itself, a viewer all; a wrong query names the parameter."""
    begun = int(time.time())
    async with aiohttp.ClientSession() as http:
        alice, bob = Client(http, cortex.url, "secret-a"), Client(http, cortex.url, "secret-b")
        await alice.chat()
        await alice.chat()
        await bob.chat()
        usage = await bob.until(3)
        assert [(row["key"], row["model"], row["requests"]) for row in usage["rows"]] == [
            ("alice", MODEL, 2),
            ("bob", MODEL, 1),
        ]
        assert usage["totals"]["cost"] == pytest.approx(3 * 8e-6)
        own = await alice.get("/usage?group_by=key")
        assert [row["key"] for row in own["rows"]] == ["alice"]
        assert (await alice.get("/usage?key=bob", status=403))["error"]["code"] == "forbidden"
        wrong = await bob.get("/usage?group_by=colour", status=400)
        assert wrong["error"]["param"] == "group_by"
        for path in ("/usage?key=a%00b", "/usage/energy?key=a%00b", "/v1/organization/costs?start_time=0%00"):
            wrong = await bob.get(path, status=400)
            assert "must not contain a NUL character" in wrong["error"]["message"]
        page = await alice.get(f"/v1/organization/usage/completions?start_time={begun}&bucket_width=1d")
        assert sum(result["num_model_requests"] for bucket in page["data"] for result in bucket["results"]) == 2
        costs = await bob.get(f"/v1/organization/costs?start_time={begun}")
        amounts = [result["amount"]["value"] for bucket in costs["data"] for result in bucket["results"]]
        assert sum(amounts) == pytest.approx(3 * 8e-6)


async def test_the_command_prints_it(cortex: CortexProcess) -> None:
    """`cortex usage` asks the running cortex."""
    async with aiohttp.ClientSession() as http:
        await Client(http, cortex.url, "secret-a").chat()
        await Client(http, cortex.url, "secret-b").until(1)
    output = await printed(cortex, "--group-by", "key", "--from", "1h", "--csv")
    (row,) = csv.DictReader(io.StringIO(output))
    assert (row["key"], row["requests"], row["currency"]) == ("alice", "1", "EUR")
    assert "not measured: benjy: its neuron does not count energy" in await printed(cortex, "--energy")


async def printed(cortex: CortexProcess, *options: str) -> str:
    """By `cortex usage`, for bob."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cortex", "usage", *options, "--url", cortex.url),
        stdout=asyncio.subprocess.PIPE,
        cwd=TOP,
        env={**os.environ, "CORTEX_API_KEY": "secret-b"},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_openais_client_reads_usage_and_costs(cortex: CortexProcess) -> None:
    """Its own methods: buckets over several pages, groups, filters, and what cortex does not have."""
    begun = int(time.time()) // 60 * 60
    async with aiohttp.ClientSession() as http:
        for key, count in (("secret-a", 2), ("secret-b", 1)):
            for _ in range(count):
                await Client(http, cortex.url, key).chat()
        await Client(http, cortex.url, "secret-b").until(3)
    async with openai.AsyncOpenAI(base_url=f"{cortex.url}/v1", api_key="", admin_api_key="secret-b") as client:
        usage = client.admin.organization.usage
        found: list[Any] = []
        starts: list[int] = []
        page: str | openai.Omit | None = openai.omit
        while page is not None:
            answer = await usage.completions(
                start_time=begun - 120,
                bucket_width="1m",
                limit=1,
                group_by=["api_key_id", "model"],
                page=page,
                batch=False,
            )
            starts += [bucket.start_time for bucket in answer.data]
            found += [result for bucket in answer.data for result in bucket.results]
            page = answer.next_page
        assert starts == list(range(begun - 120, begun - 120 + 60 * len(starts), 60))
        assert len(starts) >= 3
        assert {type(result).__name__ for result in found} == {"DataResultOrganizationUsageCompletionsResult"}
        sums: Counter[str] = Counter()
        for result in found:
            sums[result.api_key_id] += result.num_model_requests
            assert (result.model, result.input_tokens, result.output_tokens) == (
                MODEL,
                3 * result.num_model_requests,
                5 * result.num_model_requests,
            )
        assert sums == {"file:alice": 2, "file:bob": 1}
        costs = await usage.costs(
            start_time=begun - 120, api_key_ids=["file:alice"], group_by=["line_item", "api_source"]
        )
        paid: list[Any] = [result for bucket in costs.data for result in bucket.results]
        assert sum(result.amount.value for result in paid) == pytest.approx(2 * 8e-6)
        nothing = await usage.embeddings(start_time=begun - 120, models=[MODEL])
        assert [result for bucket in nothing.data for result in bucket.results] == []
        batches = await usage.completions(start_time=begun - 120, batch=True)
        assert [result for bucket in batches.data for result in bucket.results] == []
        with pytest.raises(openai.BadRequestError, match="unknown parameter 'project_ids"):
            await usage.completions(start_time=begun, project_ids=["p"])


async def test_a_killed_recorder_is_replaced(cortex: CortexProcess) -> None:
    """What has been written to the journals meanwhile follows."""
    async with aiohttp.ClientSession() as http:
        alice, bob = Client(http, cortex.url, "secret-a"), Client(http, cortex.url, "secret-b")
        await alice.chat()
        await bob.until(1)
        children = psutil.Process(cortex.process.pid).children()
        next(child for child in children if "cortex.accounts.usage" in child.cmdline()).kill()
        await alice.chat()
        await bob.until(2)
