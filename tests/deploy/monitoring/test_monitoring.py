"""What dashboards and alerts ask for is on the pages of a real fleet; promtool accepts the files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from neuron.gpu.simulated_vram import CONDITIONS_FILE
from tests.deploy.monitoring.promql import Metrics, UnknownName, labels_of, templated
from tests.processes import eventually
from tests.services import TOKEN, running_fleet

TOP = Path(__file__).parents[3]
PROMETHEUS = TOP / "deploy" / "prometheus"
GRAFANA = TOP / "deploy" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
OF_TARGET = {"job", "instance"}
"""Labels that Prometheus itself adds."""
AS_JSON = {"Content-Type": "application/json"}
PASSING = (
    "cortex_requests_waiting",
    "cortex_requests_in_flight",
    "cortex_energy_wh_total",
    "cortex_time_per_token_seconds_bucket",
)
"""Metrics that are not on the page all the time, or not at once."""

pytestmark = pytest.mark.timeout(600)  # the first test's time includes the fleet and what happens there


def page(url: str, token: str | None = None) -> str:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(url, None, headers), timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def model(name: str, *args: str) -> dict[str, Any]:
    return {"id": name, "harness": "sim", "vram_mb": 1000, "args": ["--load-secs", "0.1", *args]}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """The metrics and labels that Prometheus would have of a fleet in which everything happened once: a stream, a
    failed load, an engine without metrics, a sick GPU, a request that waits."""
    directory = tmp_path_factory.mktemp("fleet")
    conditions = directory / "state" / "vram" / CONDITIONS_FILE
    conditions.parent.mkdir(parents=True)
    conditions.write_text(json.dumps({"1": {"fault": "Xid 79"}}), encoding="utf-8")
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090", "RTX 4090"], "ram_mb": 64000}}
    catalogue = [
        model("good"),
        model("bad", "--fault", "oom-at-load"),
        model("mute", "--fault", "no-metrics"),
        model("endless", "--fault", "never-ready"),
        model("slow", "--tokens-per-sec", "1"),
    ]
    cortex = {"state_dir": str(directory / "cortex"), "poll": {"interval_secs": 0.2}}
    with running_fleet(directory, neuron, cortex, {"models": catalogue}) as fleet:
        for name in ("good", "mute", "bad", "slow"):
            body = {"model": name, "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
            assert (fleet.cortex.request("/v1/chat/completions", body).status == 200) == (name != "bad")
        body = {"model": "good", "max_tokens": 3, "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        ask = urllib.request.Request(f"{fleet.cortex.url}/v1/chat/completions", json.dumps(body).encode(), AS_JSON)
        with urllib.request.urlopen(ask, timeout=60) as stream:
            assert b"[DONE]" in stream.read()
        config = (directory / "cortex.toml").read_text(encoding="utf-8")
        base = "http://" + re.search(r'metrics_listen = "(.*)"', config)[1]  # type: ignore[index]
        found: defaultdict[str, set[str]] = defaultdict(set, {"up": OF_TARGET})
        _note(page(f"{base}/metrics/engines"), found, {"job"})  # honor_labels: `instance` is the engine's
        (target,) = (t for t in json.loads(page(f"{base}/metrics/targets")) if t["labels"]["service"] == "neuron")
        labels = {name for name in target["labels"] if not name.startswith("__")}
        address = f"{target['labels']['__scheme__']}://{target['targets'][0]}{target['labels']['__metrics_path__']}"
        _note(page(address, TOKEN), found, OF_TARGET | labels)
        with open_request(fleet.cortex.url, "endless"), open_request(fleet.cortex.url, "slow"):
            awaited = {f"{name}{{" for name in PASSING}
            eventually(lambda: all(name in page(f"{base}/metrics") for name in awaited), f"{awaited}", within_secs=300)
            _note(page(f"{base}/metrics"), found, OF_TARGET)
    return found


@contextlib.contextmanager
def open_request(url: str, name: str) -> Iterator[None]:
    """A request that has no answer yet; its client leaves at the end."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hello"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        yield


def _note(text: str, found: defaultdict[str, set[str]], more: set[str]) -> None:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= {*sample.labels, *more}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_use_metrics_and_labels_that_exist(path: Path, metrics: Metrics) -> None:
    """In each panel's queries, in its legends, and in the choices at the top."""
    dashboard = read(path)
    for panel in panels(dashboard):
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            labels = labels_of(target["expr"], metrics)
            assert set(templated(target["legendFormat"])) <= labels, (panel["title"], target["legendFormat"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert label in metrics[name]
            assert variable["query"]["query"] == variable["definition"]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_use_metrics_and_labels_that_exist(rule: dict[str, Any], metrics: Metrics) -> None:
    labels = labels_of(rule["expr"], metrics)
    for text in rule["annotations"].values():
        assert set(templated(text)) <= labels, text


@pytest.mark.parametrize(
    "expression",
    [
        "absent_metric",
        'cortex_node_healthy{absent="x"}',
        "sum by (absent) (cortex_node_healthy)",
        "cortex_node_healthy / on (absent) cortex_node_healthy",
        "rate(sum(up)[5m:absent])",
        "sum by (node, model) (rate(cortex_requests_total{code='x'}[$__rate_interval]))",
    ],
)
def test_the_comparison_finds_what_does_not_exist(expression: str, metrics: Metrics) -> None:
    with pytest.raises((UnknownName, ValueError)):
        labels_of(expression, metrics)


def test_results_have_the_labels_that_prometheus_gives_them(metrics: Metrics) -> None:
    assert labels_of("sum(up)", metrics) == set()
    assert labels_of("sum by (node) (cortex_node_healthy) > 0", metrics) == {"node"}
    assert labels_of("histogram_quantile(0.9, rate(cortex_cold_start_seconds_bucket[1h]))", metrics) == {
        "model", "node", *OF_TARGET,
    }  # fmt: skip
    memory = "neuron_device_memory_used_bytes"
    assert labels_of(f"{memory} / on (node, index) {memory}", metrics) == {"node", "index"}


def test_every_dashboard_can_be_provisioned() -> None:
    """Each has an id and a title of its own, and distinct panels that stay inside the grid without an overlap."""
    dashboards = [read(path) for path in DASHBOARDS]
    assert len({each["uid"] for each in dashboards}) == len({each["title"] for each in dashboards}) == 2
    for dashboard in dashboards:
        places = [each["gridPos"] for each in dashboard["panels"]]
        assert len({each["id"] for each in dashboard["panels"]}) == len(places)
        cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(cells) == len(set(cells))
        assert all(0 <= x < 24 for x, _ in cells)
    for path in (GRAFANA / "provisioning").rglob("*.yaml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["apiVersion"] == 1


def promtool(*arguments: str) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must run promtool: install the package prometheus")
        pytest.skip("no promtool (Debian: the package prometheus)")
    ended = subprocess.run(
        [tool, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_promtool_accepts_the_files() -> None:
    """The scrape file with the rules that it names."""
    assert f"{len(rules())} rules found" in promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


def test_each_alert_fires_for_its_fault_and_none_for_a_healthy_fleet() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))


def test_every_alert_has_a_case_and_is_documented() -> None:
    """In the test of promtool, and in docs/monitoring.md."""
    cases = Path(__file__).with_name("alerts_test.yml").read_text(encoding="utf-8")
    document = (TOP / "docs" / "monitoring.md").read_text(encoding="utf-8")
    names = [rule["alert"] for rule in rules()]
    assert [name for name in names if f'alertname="{name}"' not in cases] == []
    assert [name for name in names if f"`{name}`" not in document] == []
