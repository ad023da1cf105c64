"""The page that Prometheus reads, from the counts of several workers."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

from prometheus_client.parser import text_string_to_metric_families

from cortex.accounts.keys.key_ring import KeyRing
from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from cortex.control.wiring import running_control
from cortex.fleet.state import Fleet
from cortex.metrics.exporter import Metrics
from cortex.metrics.request_tally import RequestTally
from tests.cortex.fleets import replica_key

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(metrics: Metrics) -> Samples:
    """Each sample of the page by its name and labels."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(sample.name, frozenset(sample.labels.items())): sample.value for f in families for sample in f.samples}


def made(*counted: RequestTally) -> Metrics:
    fleet = Fleet([("beast", "http://beast")], unhealthy_after=3)
    return Metrics(
        fleet, lambda: {replica_key("m", "beast"): 2}, lambda: [each.collect(callers=True) for each in counted]
    )


def key(name: str, model: str = "m", **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset({"model": model, "node": "beast", **labels}.items())


def test_the_page_is_the_sum_of_the_workers() -> None:
    """The page includes what workers count between two scrapes."""
    one, two = RequestTally(), RequestTally()
    metrics = made(one, two)
    one.request("m", "beast", 200, 0.3, 0.02)
    two.request("m", "beast", 200, 40.0, None)
    two.error("m", "beast", "upstream_lost")
    two.tokens("m", "beast", 3, 5, 0)
    page = samples(metrics)
    assert page[key("cortex_requests_total", status="200")] == 2
    assert page[key("cortex_request_errors_total", code="upstream_lost")] == 1
    assert page[key("cortex_tokens_total", kind="completion")] == 5
    assert page[key("cortex_requests_in_flight")] == 2
    assert page["cortex_node_healthy", frozenset({("node", "beast")})] == 0
    one.request("m", "beast", 200, 0.3, None)
    assert samples(metrics)[key("cortex_requests_total", status="200")] == 3


def test_buckets_add_up() -> None:
    """Each holds those below it, the last all of them, as Prometheus wants it."""
    counters = RequestTally()
    for secs in (0.05, 0.2, 0.25, 1e6):
        counters.request("m", "beast", 200, secs, None)
    page = samples(made(counters))
    name = "cortex_request_duration_seconds"
    counts = [page[key(f"{name}_bucket", le=le)] for le in ("0.05", "0.1", "0.25", "1800.0", "+Inf")]
    assert counts == [1, 1, 3, 3, 4]
    assert (page[key(f"{name}_count")], page[key(f"{name}_sum")]) == (4, 1e6 + 0.5)
    assert key("cortex_time_to_first_byte_seconds_count") not in page


def test_cold_starts_are_counted_where_models_are_loaded() -> None:
    """Cold starts are exported as a number and as durations."""
    metrics = made()
    metrics.cold_start("m", "beast", 12.0)
    page = samples(metrics)
    assert page[key("cortex_cold_starts_total")] == page[key("cortex_cold_start_seconds_bucket", le="20.0")] == 1
    assert page[key("cortex_cold_start_seconds_bucket", le="10.0")] == 0


def test_any_name_of_a_model_survives_the_page() -> None:
    """Escaped, so that it breaks no line; and no series but the documented ones is made."""
    counters, name = RequestTally(), 'we"ird\\\n{ü}'
    counters.request(name, "beast", 200, 1.0, 1.0)
    page = made(counters).exposition()
    assert samples(made(counters))[key("cortex_requests_total", model=name, status="200")] == 1
    assert b"_created" not in page


async def test_what_ended_workers_counted_for_a_key_goes_with_it(tmp_path: Path) -> None:
    """Or a year of keys that are rotated and workers that are replaced would stay in memory."""
    file, keys, tally = tmp_path / "keys.toml", KeyRing(environ={}), RequestTally()
    tables = [f'[[keys]]\nname = "{name}"\nkey = "sk-{name}"\n' for name in ("old", "new")]
    file.write_text("".join(tables))
    await keys.load(file)
    async with running_control(CortexConfig(), Catalogue(), keys=keys) as parts:
        for name in ("old", "new", "oidc:ann@example.com"):
            tally.caller(name, "m", 200, None)
        worker = Mock(collect=tally.collect)
        parts.counts.attach(worker)
        parts.counts.detach(worker)
        (ended,) = parts.counts.counters(callers=True)
        assert set(ended.callers) == {"old", "new", "oidc:people"}
        file.write_text(tables[1])
        await keys.load(file)
        (ended,) = parts.counts.counters(callers=True)
        assert set(ended.callers) == {"new", "oidc:people"}
