"""The routes and metrics of both services are complete and documented."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from aiohttp import web

from cortex.api.authorization import NEEDED_ROLES
from cortex.api.routes import CONTROL_ROUTES, METRICS_ROUTES
from cortex.fleet.poller import PollCounts
from cortex.fleet.state import Fleet
from cortex.metrics.exporter import Metrics
from cortex.metrics.request_tally import RequestTally
from cortex.routing.replica import LoadPhase
from cortex.upstream.usage import Usage
from neuron.app import build_app
from neuron.config import NeuronConfig
from neuron.metrics import NeuronMetrics
from shared.protocol import Device, DeviceHealth, ErrorCode, SpareView
from tests.contract.documents import TOP
from tests.cortex.fleets import replica_key

NEURON_TABLE = {
    ("GET", "/discovery"),
    ("GET", "/health"),
    ("GET", "/models"),
    ("POST", "/models/load"),
    ("POST", "/models/unload"),
    ("POST", "/models/sleep"),
    ("POST", "/models/wake"),
    ("POST", "/models/lease"),
    ("POST", "/adapters/load"),
    ("POST", "/adapters/unload"),
    ("POST", "/groups/listen"),
    ("POST", "/groups/reach"),
    ("GET", "/models/{model_id}/endpoint"),
    ("GET", "/models/{model_id}/logs"),
    ("GET", "/estimate"),
    ("GET", "/events"),
    ("GET", "/metrics"),
}
INFERENCE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
CORTEX_TABLE = {
    *(("POST", path) for path in INFERENCE),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/health"),
    ("GET", "/fleet"),
    ("GET", "/fleet/events"),
    ("GET", "/fleet/explain"),
    ("GET", "/fleet/timeline"),
    ("GET", "/fleet/requests"),
    ("GET", "/fleet/logs"),
    ("POST", "/fleet/register"),
    ("GET", "/fleet/configuration"),
    ("POST", "/fleet/configuration/reload"),
    ("POST", "/fleet/load"),
    ("POST", "/fleet/unload"),
    ("POST", "/fleet/sleep"),
    ("POST", "/fleet/wake"),
    ("POST", "/fleet/restart"),
    ("POST", "/fleet/nodes/{name}/drain"),
    ("POST", "/fleet/nodes/{name}/resume"),
    ("GET", "/usage"),
    ("GET", "/usage/energy"),
    ("GET", "/v1/organization/usage/completions"),
    ("GET", "/v1/organization/usage/embeddings"),
    ("GET", "/v1/organization/costs"),
    ("GET", "/dashboard/me"),
    ("GET", "/dashboard/{path}"),
    ("GET", "/keys"),
    ("POST", "/keys"),
    ("DELETE", "/keys/{name}"),
    ("POST", "/keys/{name}/rotate"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/login"),
    ("GET", "/login/callback"),
    ("GET", "/login/settings"),
    ("POST", "/logout"),
}
CORTEX_METRICS = {
    "cortex_requests_total": {"model", "node", "status"},
    "cortex_request_errors_total": {"model", "node", "code"},
    "cortex_cold_starts_total": {"model", "node"},
    "cortex_request_duration_seconds": {"model", "node"},
    "cortex_time_to_first_byte_seconds": {"model", "node"},
    "cortex_cold_start_seconds": {"model", "node"},
    "cortex_requests_in_flight": {"model", "node"},
    "cortex_instance_requests_in_flight": {"model", "node", "engine"},
    "cortex_node_healthy": {"node"},
    "cortex_time_to_first_token_seconds": {"model", "node"},
    "cortex_time_per_token_seconds": {"model", "node"},
    "cortex_request_wait_seconds": {"model", "node"},
    "cortex_failovers_total": {"model", "node", "kind"},
    "cortex_relayed_bytes_total": {"model", "node", "kind"},
    "cortex_caller_requests_total": {"key", "model", "status"},
    "cortex_caller_tokens_total": {"key", "model", "kind"},
    "cortex_caller_device_seconds_total": {"key", "kind"},
    "cortex_cold_start_phase_seconds": {"model", "node", "phase"},
    "cortex_displacements_total": {"model", "node", "reason"},
    "cortex_node_poll_seconds": {"node"},
    "cortex_node_poll_failures_total": {"node"},
    "cortex_tokens_total": {"model", "node", "kind"},
    "cortex_usage_records_dropped_total": set(),
    "cortex_energy_wh_total": {"model", "kind"},
    "cortex_requests_waiting": {"model"},
    "cortex_load_failures_total": {"model", "node"},
    "cortex_engine_scrape_failures_total": {"model", "node"},
    "cortex_state_disk_free_bytes": set(),
    "cortex_usage_journal_bytes": set(),
}
NEURON_METRICS = {
    "neuron_device_memory_used_bytes",
    "neuron_engine_state",
    "neuron_engine_restarts_total",
    "neuron_model_load_seconds",
}


def routes_of(app: web.Application) -> set[tuple[str, str]]:
    """(method, path) of every route, without patterns of variables, including aiohttp's HEAD for each GET."""
    found = set()
    for route in app.router.routes():
        resource = route.resource
        assert resource is not None
        found.add((route.method, re.sub(r":[^}]+(?=})", "", resource.canonical)))
    return {(method, path) for method, path in found if method != "HEAD"}


def document(name: str) -> str:
    return (TOP / "docs" / name).read_text(encoding="utf-8")


def sample_names(exposition: bytes) -> set[str]:
    """The names of the families on a metrics page, with `_total` for counters."""
    names = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", exposition.decode(), re.MULTILINE):
        if not name.endswith("_created"):
            names.add(name if kind != "counter" or name.endswith("_total") else f"{name}_total")
    return names


def test_cortex_has_every_route() -> None:
    """cortex has exactly the routes of the contract."""
    app = web.Application()
    app.add_routes(CONTROL_ROUTES)
    assert routes_of(app) == CORTEX_TABLE
    paths = ["/metrics", "/metrics/engines", "/metrics/targets"]
    assert [(route.method, route.path) for route in METRICS_ROUTES] == [("GET", path) for path in paths]
    assert [path for path in paths if f"`GET {path}`" not in document("api.md")] == []


def test_every_route_of_cortex_needs_a_role() -> None:
    """The table of roles has exactly the routes, so that none can be forgotten."""
    app = web.Application()
    app.add_routes(CONTROL_ROUTES)
    assert routes_of(app) == set(NEEDED_ROLES)


def test_neuron_has_every_route() -> None:
    """neuron has exactly the routes of the protocol."""
    assert routes_of(build_app(NeuronConfig(), port=1)) == NEURON_TABLE


@pytest.mark.parametrize(("name", "table"), [("api.md", CORTEX_TABLE), ("protocol.md", NEURON_TABLE)])
def test_every_route_is_documented(name: str, table: Iterable[tuple[str, str]]) -> None:
    """Each path is in its service's document, in code marks."""
    text = document(name).replace("/v1/models/{id}", "/v1/models/{model_id}")
    for method, path in table:
        assert re.search(rf"`(?:{method} )?{re.escape(path)}[`?]", text), (method, path)


async def test_cortex_metrics_match_the_contract_and_are_documented(tmp_path: Path) -> None:
    """Names and labels are those of the contract, and docs/api.md explains each with its labels."""
    fleet, counts = Fleet([("beast", "http://beast")], unhealthy_after=3), RequestTally()
    in_flight = {replica_key("m", "beast", "1"): 1}
    metrics = Metrics(
        fleet,
        lambda: in_flight,
        lambda: [counts.collect(callers=True)],
        waiting=lambda: {"m": 1},
        charged=lambda: {("ci", "serving"): 1.0},
        state_dir=tmp_path,
    )
    metrics.polls = lambda: {"beast": PollCounts(answered=1, failed=1)}
    counts.request("m", "beast", 200, 1.0, 0.1, waited_secs=0.1)
    counts.answer("m", "beast", 1, 1)
    counts.stream("m", "beast", 0.1, 0.9, 9)
    counts.failover("m", "beast", "reset")
    counts.caller("ci", "m", 200, Usage(1, 1))
    metrics.displaced(replica_key("m", "beast"), "idle")
    counts.error("m", "beast", "code")
    counts.tokens("m", "beast", prompt=1, completion=1, cached=0)
    metrics.cold_start("m", "beast", 1.0, [LoadPhase("starting", 0.0, 1.0)])
    metrics.energy.wh["m", "request"] = 1.0
    metrics.load_failed("m", "beast")
    metrics.engine_scrape_failed("m", "beast")
    metrics.measure_disk()
    page = metrics.exposition()
    assert sample_names(page) == set(CORTEX_METRICS)
    for name, labels in CORTEX_METRICS.items():
        sample = re.search(rf"^{name}(?:_count)?(?:\{{([^}}]*)\}})? ", page.decode(), re.MULTILINE)
        assert sample is not None, name
        assert set(re.findall(r"(\w+)=", sample[1] or "")) == labels
        row = re.search(rf"^\| `{name}` \| ([\w, ]+) \|", document("api.md"), re.MULTILINE)
        assert row is not None, name
        assert set(row[1].split(", ")) == (labels or {"none"})


def test_neuron_metrics_are_documented() -> None:
    """Every family on a neuron's page is explained in docs/protocol.md; those of the contract are among them."""
    metrics = NeuronMetrics()
    metrics.loaded("m", 1.0)
    metrics.known("m")
    page = metrics.render([], [Device(index=0, uuid="GPU-0")], [DeviceHealth(index=0)], [SpareView(harness="h")])
    names = sample_names(page)
    assert names >= NEURON_METRICS
    for name in names:
        assert f"| `{name}` |" in document("protocol.md")


def codes_in_tables(text: str) -> set[str]:
    """The codes in the columns titled `code`: those that a cell begins with, separated by commas."""
    found: set[str] = set()
    for title, rows in re.findall(r"^(\|.*`code`.*)\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        column = [cell.strip() for cell in title.split("|")].index("`code`")
        for row in rows.splitlines():
            begin = re.match(r"(?:`\w+`(?:, )?)+", row.split("|")[column].strip())
            assert begin is not None, row
            found.update(re.findall(r"\w+", begin[0]))
    return found


def test_error_codes_and_documents_agree() -> None:
    """Every code that cortex or neuron can send is in a document, and the tables name no other."""
    text = document("api.md") + document("protocol.md")
    codes = {str(code) for code in ErrorCode}
    assert {code for code in codes if f"`{code}`" not in text} == set()
    assert codes_in_tables(text) - codes == set()


def test_no_error_code_is_written_as_a_string() -> None:
    """Services use the members of ErrorCode, so the enum is the whole list. The simulated engine imitates vLLM."""
    for package in ("cortex", "neuron", "shared"):
        for path in (TOP / package).rglob("*.py"):
            if "sim" not in path.relative_to(TOP).parts:
                assert not re.search(r"\bcode ?= ?[\"']", path.read_text(encoding="utf-8")), path
