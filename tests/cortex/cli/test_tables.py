"""What `cortex status` and `cortex explain` print."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cortex.cli.tables import explain_table, keys_table, loaded_line, models_table, status_table, unloaded_line


@pytest.mark.parametrize(
    ("status", "progress", "said"),
    [
        (
            "loading",
            {"phase": "loading weights", "fraction": 0.4, "remaining_secs": 34.6},
            "m (loading weights 40 %, about 35 s)",
        ),
        ("loading", {"phase": "compiling", "fraction": None}, "m (compiling)"),
        ("reloading", {"phase": "starting", "remaining_secs": 0.4}, "m (reloading, starting, about 0 s)"),
        ("loading", {}, "m (loading)"),
        ("loading", None, "m (loading)"),
        ("loaded", {"phase": "warming up", "fraction": 1.0}, "m (loaded)"),
    ],
)
def test_progress_in_the_table(status: str, progress: dict[str, Any] | None, said: str) -> None:
    """The table shows as much as the neuron reports; a protocol v1 neuron reports no progress."""
    model = {"id": "m", "status": status, "progress": progress}
    node = {"name": "n", "healthy": True, "draining": False, "models": [model], "devices": []}
    assert said in status_table({"nodes": [node], "loads": []})


def test_instances_in_the_tables() -> None:
    """Each has its name where the neuron has several; one that is alone looks as before."""
    engines: list[dict[str, Any]] = [
        {"id": "m", "instance": "0", "status": "loaded"},
        {"id": "m", "instance": "1", "status": "sleeping"},
        {"id": "o", "instance": "0", "status": "loaded"},
    ]
    node = {"name": "n", "healthy": True, "draining": False, "models": engines, "devices": []}
    rows = status_table({"nodes": [node], "loads": []}).splitlines()
    assert [row.split("  ")[-1] for row in rows[1:]] == ["m#0 (loaded)", "m#1 (sleeping)", "o (loaded)"]
    locations = [
        {"node": node, "status": status} for node, status in (("a", "loaded"), ("a", "loaded"), ("b", "failed"))
    ]
    entry = {"id": "m", "loaded": True, "feasible_on": ["a", "b"], "locations": locations}
    assert "a (2 loaded), b (failed)" in models_table({"data": [entry]})


def test_ram_in_the_status() -> None:
    """On a host without GPUs, and where a model is in RAM."""
    host = {"ram_total_mb": 64_000, "ram_used_mb": 5_000}
    on_cpu = {"id": "m", "instance": "0", "status": "loaded", "ram_booked_mb": 4_000}
    gpu = {"index": 0, "name": "H100", "vram_total_mb": 80_000}
    for devices, models, shown in (([], [], True), ([gpu], [on_cpu], True), ([gpu], [], False)):
        node = {"name": "n", "healthy": True, "draining": False, "models": models, "devices": devices, "host": host}
        assert ("RAM 5000/64000 MiB" in status_table({"nodes": [node], "loads": []})) is shown


def test_status_says_which_device_has_which_engine() -> None:
    """A row for each engine, in the order of their names, with its devices where the neuron has several; a load in
    progress names its instance."""
    engines: list[dict[str, Any]] = [
        {"id": "s", "instance": "10", "status": "loaded", "devices": [3]},
        {"id": "s", "instance": "9", "status": "loaded", "devices": [2]},
        {"id": "b", "instance": "0", "status": "loading", "devices": [0, 1]},
    ]
    devices = [{"index": index, "name": "H100", "vram_total_mb": 80000} for index in range(2)]
    node = {"name": "n", "healthy": True, "draining": False, "models": engines, "devices": devices}
    job = {"model": "s", "node": "n", "instance": "11", "reason": "fits"}
    rows = status_table({"nodes": [node], "loads": [job]}).splitlines()
    assert [row.split("MiB  ")[-1].strip() for row in rows[1:3]] == ["b on 0 1 (loading)", "s#9 on 2 (loaded)"]
    assert rows[3].strip() == "s#10 on 3 (loaded)"
    assert rows[-1].split() == ["s", "n#11", "loading", "fits"]


def test_status_says_why_a_model_failed() -> None:
    """An operator need not ask the neuron: the reason stands on one line, and a fleet without failures has no table."""
    engines: list[dict[str, Any]] = [
        {"id": "m", "instance": "1", "status": "failed", "error": "cannot start 'x':\nno such file"},
        {"id": "o", "instance": "0", "status": "loaded", "error": None},
    ]
    node = {"name": "n", "healthy": True, "draining": False, "models": engines, "devices": []}
    rows = status_table({"nodes": [node], "loads": []}).splitlines()
    assert [row.split() for row in rows[-2:]] == [
        ["FAILED", "ON", "REASON"],
        ["m", "n#1", "cannot", "start", "'x':", "no", "such", "file"],
    ]
    assert "FAILED" not in status_table({"nodes": [{**node, "models": engines[1:]}], "loads": []})


def test_status_says_that_a_gpu_is_split() -> None:
    """Its memory belongs to its MIG instances."""
    devices = [
        {"index": 0, "name": "A100", "vram_total_mb": 80000, "vram_used_mb": 0, "mig_mode": True},
        {"index": 101, "name": "A100 MIG 1g.10gb", "vram_total_mb": 9850, "vram_used_mb": 7, "mig_mode": None},
    ]
    node = {"name": "n", "healthy": True, "draining": False, "models": [], "devices": devices}
    text = status_table({"nodes": [node], "loads": []})
    assert "0: A100 in MIG mode" in text
    assert "101: A100 MIG 1g.10gb 7/9850 MiB" in text


def test_an_operator_is_told_which_instance() -> None:
    """As `node#instance`, except for the only or first one."""
    assert loaded_line({"model": "m", "node": "n", "instance": "2"}) == "m was already loaded on n#2"
    assert loaded_line({"model": "m", "node": "n", "instance": "0"}) == "m was already loaded on n"
    results = [{"node": "n", "instance": "1", "status": "unloaded"}, {"node": "old", "status": "unloaded"}]
    assert unloaded_line({"model": "m", "nodes": ["n", "old"], "results": results}) == "m is unloaded from n#1, old"


def test_explain_does_not_repeat_itself() -> None:
    """A reason that the decision contains is not printed again in the table; a drained node says how to end that."""
    long = "needs 30000 MiB, has 24000 MiB free"
    nodes: list[dict[str, Any]] = [
        {"node": name, "feasible": True, "status": None, "devices": [], "reason": reason}
        for name, reason in (("a", long), ("b", "draining"))
    ]
    decision = {"action": "refuse", "reason": f"not enough memory for the model 'm' now (a: {long})"}
    text = explain_table({"model": "m", "decision": decision, "nodes": nodes})
    assert text.count(long) == 1
    assert "as above" in text
    assert "draining: takes no new loads until `cortex resume b`" in text


def test_explain_shows_the_engines_there_are() -> None:
    """Their devices and variants, not those of the next one, and what is missing from the minimum."""
    there = [
        {"instance": name, "status": "loaded", "devices": on, "variant": "awq"}
        for name, on in (("0", [0, 1]), ("1", [2, 3]))
    ]
    nodes = [
        {
            "node": "a",
            "feasible": True,
            "status": "loaded",
            "instances": there,
            "devices": [4, 5],
            "reason": "fits",
            "variant": "fp8",
        }
    ]
    plan: dict[str, Any] = {
        "model": "m",
        "decision": {"action": "serve", "node": "a", "reason": "loaded there"},
        "nodes": nodes,
    }
    counted = {"min": 4, "max": 4, "serving": 2, "coming": 1, "missing_because": "a: no room"}
    text = explain_table({**plan, "replicas": counted})
    assert "\n  2 of replicas.min 4 serving, 1 on the way; missing: a: no room\n" in text
    assert text.splitlines()[-1].split(maxsplit=4) == ["a", "yes", "loaded", "awq", "0 1, 2 3  another on 4 5: fits"]


def test_explain_says_until_when_a_model_is_not_loaded() -> None:
    """After a failed load, and while an operator holds it back."""
    nodes: list[dict[str, Any]] = [
        {"node": name, "feasible": True, "status": None, "devices": [], "reason": "no", "retry_in_secs": secs}
        for name, secs in (("a", 299.5), ("b", 299.5), ("c", None), ("d", 7200))
    ]
    decision = {"action": "refuse", "reason": "loading 'm' on a failed"}
    text = explain_table({"model": "m", "decision": decision, "nodes": nodes})
    assert re.search(r"\n  not loaded on a, b until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, for another 5 min\n", text)
    assert re.search(r"\n  not loaded on d until .*, for another 2 h\n", text)


def test_variants_in_the_tables() -> None:
    """Where a model has variants, each engine's is shown, and why a node does not get a better one."""
    place = {"status": "loaded", "variant": "awq"}
    node = {"name": "n", "healthy": True, "draining": False, "devices": []}
    models = [
        {"id": "m", **place},
        {"id": "o", "status": "loading", "variant": "fp8", "progress": {"phase": "starting"}},
    ]
    text = status_table({"nodes": [{**node, "models": models}], "loads": []})
    assert "m (loaded, awq)\n" in text
    assert "o (fp8, starting)" in text
    entry = {"id": "m", "loaded": True, "feasible_on": ["n"], "locations": [{"node": "n", **place}]}
    assert "n (loaded, awq)" in models_table({"data": [entry]})
    nodes: list[dict[str, Any]] = [
        {"node": name, "feasible": True, "status": None, "devices": [0], "reason": "fits", "variant": variant}
        for name, variant in (("a", "fp8"), ("b", "awq"), ("c", None))
    ]
    nodes[1]["passed_over"] = [{"variant": "fp8", "reason": "needs more"}]
    text = explain_table({"model": "m", "decision": {"action": "load", "reason": "a: fp8 fits"}, "nodes": nodes})
    rows = [line.split() for line in text.splitlines()[-3:]]
    assert [row[3] for row in rows] == ["fp8", "awq", "-"]
    assert "fits; not fp8: needs more" in text


@pytest.mark.parametrize(
    ("expires_at", "shown"),
    [(None, "never"), (1700000000.0, "2023-11-14 22:13 UTC (expired)"), (4102444800.0, "2100-01-01 00:00 UTC")],
)
def test_expired_keys_are_marked(expires_at: float | None, shown: str) -> None:
    key: dict[str, Any] = {
        "name": "a",
        "id": "file:a",
        "prefix": "",
        "role": "user",
        "models": [],
        "source": "database",
    }
    key |= {"rpm": None, "tpm": None, "parallel": None, "budget": [], "expires_at": expires_at}
    row = keys_table({"keys": [key]}).splitlines()[-1]
    assert re.split(r" {2,}", row) == ["a", "file:a", "-", "user", "all", "none", shown, "database"]
