"""`/metrics/engines` and `/metrics/targets`, as Prometheus reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cortex.api.engines import scraping
from cortex.api.engines.engine_questions import EngineQuestions
from cortex.api.engines.metrics_pages import MAX_LINE, MetricsPages
from cortex.api.engines.scraping import EngineScrapes
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.raw_engine import RawEngine, Received, answering, plain
from tests.cortex.raw_http import Wire
from tests.cortex.raw_neuron import RawNeuron

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a"} 1.0
# HELP vllm:e2e_request_latency_seconds Histogram of e2e request latency in seconds.
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.3",model_name="a"} 2.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf",model_name="a"} 3.0
vllm:e2e_request_latency_seconds_count{engine="0",model_name="a"} 3.0
vllm:e2e_request_latency_seconds_sum{engine="0",model_name="a"} 1.5
# HELP python_info Python platform information
# TYPE python_info gauge
python_info{implementation="CPython",version="3.12"} 1.0
"""


@pytest.fixture
async def engines() -> AsyncIterator[list[RawEngine]]:
    async with RawEngine().running() as one, RawEngine().running() as two:
        yield [one, two]


async def loaded(
    start_cortex: StartCortex, neuron: RawNeuron, engines: list[RawEngine], **gateway: str
) -> RunningCortex:
    """A cortex that knows models m0, m1, ... on these engines."""
    for number, engine in enumerate(engines):
        neuron.change(f"m{number}", "loaded", endpoint={"url": engine.url, "api_key": "secret"}, instance=f"i{number}")
    cortex = await start_cortex([neuron], [{"id": "m0"}, {"id": "m1"}], gateway=gateway)
    await cortex.until(lambda: all(cortex.parts.fleet.snapshot().serving(f"m{n}") for n in range(len(engines))))
    return cortex


async def page(cortex: RunningCortex, path: str = "/metrics/engines") -> str:
    async with cortex.http.get(cortex.metrics_url + path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.text()


def samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def failures(text: str) -> dict[str, float]:
    name = "cortex_engine_scrape_failures_total"
    return {sample.labels["model"]: sample.value for sample in samples(text) if sample.name == name}


async def test_each_sample_says_whose_it_is(start_cortex: StartCortex, engines: list[RawEngine]) -> None:
    """Each family appears once, with its type, and has the samples of both engines."""
    for engine in engines:
        engine.script = answering(plain(VLLM, content_type="text/plain"))
    async with RawNeuron().running() as neuron:
        cortex = await loaded(start_cortex, neuron, engines)
        text = await page(cortex)
        for number in (0, 1):
            ours = {"model": f"m{number}", "node": "raw", "instance": f"i{number}"}
            found = [s for s in samples(text) if ours.items() <= s.labels.items()]
            assert len(found) == 6
            running = next(s for s in found if s.name == "vllm:num_requests_running")
            assert running.labels == {**ours, "engine": "0", "model_name": "a"}
        assert len(samples(text)) == 12
        assert text.count("# TYPE vllm:e2e_request_latency_seconds histogram") == 1
        received = engines[0].requests[0]
        assert (received.target, received.get("authorization")) == ("/metrics", "Bearer secret")
        assert failures(await page(cortex, "/metrics")) == {}


@pytest.mark.parametrize("fault", ["silent", "error", "too large", "no metrics", "dead"])
async def test_a_bad_engine_costs_only_its_own_lines(
    start_cortex: StartCortex, engines: list[RawEngine], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted; the page has the other engine's metrics."""

    async def silent(wire: Wire, received: Received) -> None:
        await wire.gone.wait()

    good, bad = engines
    good.script = answering(plain(VLLM))
    if fault == "silent":
        monkeypatch.setattr(scraping, "ENGINE_SECS", 1.0)
    bad.script = {
        "silent": silent,
        "error": answering(plain(VLLM, status="500 Oh")),
        "too large": answering(plain(VLLM + b"# " + b"x" * scraping.MAX_PAGE_BYTES)),
        "no metrics": answering(plain(b"<html>hello</html>")),
        "dead": silent,
    }[fault]
    async with RawNeuron().running() as neuron:
        cortex = await loaded(start_cortex, neuron, engines)
        if fault == "dead":
            neuron.change("m1", "loaded", endpoint={"url": "http://127.0.0.1:1"}, instance="i1")
            await neuron.streaming.wait()
            await neuron.tell("model", neuron.models["m1"])
            view = "http://127.0.0.1:1"
            await cortex.until(lambda: cortex.parts.fleet.snapshot().serving("m1")[0].view.endpoint.url == view)  # type: ignore[union-attr]
        assert {sample.labels["model"] for sample in samples(await page(cortex))} == {"m0"}
        assert failures(await page(cortex, "/metrics")) == {"m1": 1}


async def test_few_engines_are_asked_at_once(
    start_cortex: StartCortex, engines: list[RawEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page may be large. The others wait for their turn."""
    monkeypatch.setattr(scraping, "MAX_AT_ONCE", 1)
    asked, most = 0, 0

    async def slow(wire: Wire, received: Received) -> None:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await asyncio.sleep(0.1)
        asked -= 1
        await wire.send(plain(VLLM))

    for engine in engines:
        engine.script = slow
    async with RawNeuron().running() as neuron:
        cortex = await loaded(start_cortex, neuron, engines)
        assert {sample.labels["model"] for sample in samples(await page(cortex))} == {"m0", "m1"}
    assert most == 1


async def test_no_more_than_fits_is_on_the_page(
    start_cortex: StartCortex, engines: list[RawEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scraping, "MAX_TOTAL_BYTES", 2 * len(VLLM) - 1)
    for engine in engines:
        engine.script = answering(plain(VLLM))
    async with RawNeuron().running() as neuron:
        cortex = await loaded(start_cortex, neuron, engines)
        assert len({sample.labels["model"] for sample in samples(await page(cortex))}) == 1
        assert sum(failures(await page(cortex, "/metrics")).values()) == 1


async def test_requests_at_the_same_time_get_the_same_page(start_cortex: StartCortex, engines: list[RawEngine]) -> None:
    """Also if the first of them leaves. The next one gets a new page."""
    go_on = asyncio.Event()

    async def held(wire: Wire, received: Received) -> None:
        await go_on.wait()
        await wire.send(plain(VLLM))

    engine = engines[0]
    engine.script = held
    async with RawNeuron().running() as neuron:
        parts = (await loaded(start_cortex, neuron, [engine])).parts
        metrics = EngineScrapes(parts.fleet, EngineQuestions(parts.clients), parts.metrics)
        first = asyncio.create_task(metrics.page())
        await engine.next_request()
        others = [asyncio.create_task(metrics.page()) for _ in range(2)]
        await asyncio.sleep(0)
        first.cancel()
        go_on.set()
        assert [len(samples((await other).decode())) for other in others] == [6, 6]
        assert len(engine.requests) == 1
        await metrics.page()
        assert len(engine.requests) == 2
        await metrics.close()


async def test_no_connection_to_an_engine_is_kept(start_cortex: StartCortex, engines: list[RawEngine]) -> None:
    """Neuron may judge by connections whether an engine is busy."""
    engines[0].script = answering(plain(VLLM))
    async with RawNeuron().running() as neuron:
        cortex = await loaded(start_cortex, neuron, engines[:1])
        await page(cortex)
        await asyncio.gather(*(wire.gone.wait() for wire in engines[0].connections))


async def test_without_engines_the_page_is_empty(start_cortex: StartCortex) -> None:
    async with RawNeuron().running() as neuron:
        cortex = await start_cortex([neuron], [{"id": "m0"}])
        assert samples(await page(cortex)) == []


async def test_targets_are_in_the_format_of_prometheus(start_cortex: StartCortex) -> None:
    """http_sd_configs: a JSON list of `targets` and `labels`, both of strings, as application/json."""
    async with RawNeuron("one").running() as neuron:
        cortex = await start_cortex([neuron], [{"id": "m0"}])
        async with cortex.http.get(f"{cortex.metrics_url}/metrics/targets") as answer:
            assert answer.content_type == "application/json"
            groups = await answer.json()
        found = {group["labels"]["service"]: group for group in groups}
        assert found["neuron"] == {
            "targets": [neuron.url.removeprefix("http://")],
            "labels": {"__scheme__": "http", "__metrics_path__": "/metrics", "service": "neuron", "node": "one"},
        }
        for service in ("cortex", "engines"):
            labels = found[service]["labels"]
            url = f"{labels['__scheme__']}://{found[service]['targets'][0]}{labels['__metrics_path__']}"
            async with cortex.http.get(url) as answer:
                assert answer.status == 200


@pytest.mark.parametrize("path", ["/metrics", "/metrics/engines", "/metrics/targets"])
async def test_every_page_needs_the_token(start_cortex: StartCortex, path: str) -> None:
    async with RawNeuron().running() as neuron, aiohttp.ClientSession() as http:
        cortex = await start_cortex([neuron], [{"id": "m0"}], gateway={"metrics_token": "t"})
        for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401), ({"Authorization": "Bearer t"}, 200)):
            async with http.get(cortex.metrics_url + path, headers=headers) as answer:
                assert answer.status == status


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("up 1", 'up{model="m"} 1'),
        ("up{} 1", 'up{model="m"} 1'),
        ("up 1 1700000000000", 'up{model="m"} 1 1700000000000'),
        ('up{model="x"} 1', 'up{model="m",exported_model="x"} 1'),
        ('up{a="model=\\"x\\", } 2",b="1",} NaN', 'up{model="m",a="model=\\"x\\", } 2",b="1"} NaN'),
        ('a:b{le="+Inf"} +Inf', 'a:b{model="m",le="+Inf"} +Inf'),
        ('up{ a = "1" , b = "2" } 1', 'up{model="m",a="1",b="2"} 1'),
        ('up{a="1", } 1 \r', 'up{model="m",a="1"} 1'),
        ('up{model="x",exported_model="y"} 1', 'up{model="m",exported_exported_model="x",exported_model="y"} 1'),
        ('up{a="1",a="2"} 1', ""),
        ("up 1e3", 'up{model="m"} 1e3'),
        ("up -.5", 'up{model="m"} -.5'),
        ("up 1e999", ""),
        ("up -nan", ""),
        ("up 1_0", ""),
        ("up \u0661", ""),
        ("up 1 9999999999999999999", ""),
        ("up\v1", ""),
        ("up one", ""),
        ("up", ""),
        ('up{a="1" 1', ""),
        ('{"my.metric"} 1', ""),
        ("# EOF", ""),
        ("", ""),
    ],
)
def test_lines(line: str, expected: str) -> None:
    """Each sample gets the labels, each odd line is left out, and the result is what a parser reads."""
    pages = MetricsPages()
    assert pages.add(f"{line}\n", {"model": "m"}) == bool(expected)
    text = pages.text()
    assert text == (f"{expected}\n" if expected else "")
    assert len(samples(text)) == bool(expected)


def test_a_page_of_blanks_is_soon_read() -> None:
    """As large as a page may be, which took hours: it ends, or the test is killed."""
    line = 'up{a="b"' + " " * (MAX_LINE - 9) + "x"
    pages = MetricsPages()
    assert pages.add("\n".join([line] * (scraping.MAX_PAGE_BYTES // MAX_LINE)), {"model": "m"}) == 0
    assert pages.add(f'up{{a="{"b" * MAX_LINE}"}} 1\nup 1', {"model": "m"}) == 1


def test_odd_names_are_escaped() -> None:
    pages = MetricsPages()
    pages.add("up 1", {"model": 'a"b\\c\nd'})
    assert samples(pages.text())[0].labels == {"model": 'a"b\\c\nd'}


def test_a_family_of_two_engines_has_one_type() -> None:
    """The first page's; the samples of the second are not in a family of their own."""
    pages = MetricsPages()
    pages.add("# TYPE a_total counter\na_total 1\n# TYPE b gauge\nb 1\n", {"model": "1"})
    pages.add("# TYPE b gauge\nb 2\n# TYPE a_total gauge\na_total 2\n", {"model": "2"})
    families = {family.name: family for family in text_string_to_metric_families(pages.text())}
    assert {name: (family.type, len(family.samples)) for name, family in families.items()} == {
        "a": ("counter", 2),
        "b": ("gauge", 2),
    }
