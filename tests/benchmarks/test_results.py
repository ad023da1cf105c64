"""Results and reports: medians, ratios, targets, the document."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.cases.case import Measured
from benchmarks.report.document import BEGIN, END, generated, replaced
from benchmarks.report.table import table
from benchmarks.report.targets import Target, targets
from benchmarks.results import Results, load


def _results() -> Results:
    results = Results(
        dict.fromkeys(
            ("date", "commit", "cpu", "cpus", "memory_gib", "kernel", "hypervisor", "python", "loop", "packages"), "?"
        ),
        {"rounds": 3},
    )
    for name in ("nginx", "cortex"):
        results.contenders[name] = {"title": name, "version": "1", "switched_on": "all", "workers": "1"}
    for nginx, cortex in ((10.0, 11.0), (20.0, 22.0), (30.0, 40.0)):
        results.cell("stream200", "nginx").add(Measured({"cpu_us": nginx}))
        results.cell("stream200", "cortex").add(Measured({"cpu_us": cortex}))
    return results


def _target(results: Results, start: str) -> Target:
    return next(target for target in targets(results) if target.text.startswith(start))


def test_a_ratio_is_taken_round_by_round() -> None:
    """A machine that gets slower during a run changes no ratio."""
    assert _results().figure("stream200", "cortex", "cpu_us") == 22.0
    assert _results().ratio("stream200", "cortex", "cpu_us") == pytest.approx(1.1)


def test_a_round_that_failed_shifts_no_ratio() -> None:
    results = Results({}, {})
    for figures in ({}, {"cpu_us": 20.0}):
        results.cell("plain", "nginx").add(Measured(figures))
    for value in (5.0, 40.0):
        results.cell("plain", "cortex").add(Measured({"cpu_us": value}))
    assert results.ratio("plain", "cortex", "cpu_us") == 2.0


def test_targets_pass_fail_or_are_not_measured() -> None:
    results = _results()
    assert _target(results, "CPU per chunk at 200 streams ≤").passed is True
    assert _target(results, "CPU per chunk at 1000 streams ≤").passed is None
    for cortex in (30.0, 60.0, 90.0):
        results.cell("stream200", "cortex").add(Measured({"cpu_us": cortex}))
    results.cells["stream200"]["cortex"].rounds[:3] = []
    assert _target(results, "CPU per chunk at 200 streams ≤").passed is False


def test_a_lost_stream_fails_the_target_for_open_streams() -> None:
    results = _results()
    lost = Measured({"ended_well": 7999.0, "kib_per_stream": 9.0}, Counter({"no end": 1}))
    results.cell("idle8000", "cortex").add(lost)
    assert _target(results, "8,000 open").passed is False
    assert _target(results, "RSS per open").passed is True
    assert "⚠" in table(results)


def test_saved_results_load_unchanged(tmp_path: Path) -> None:
    results = _results()
    results.save(tmp_path / "results.json")
    again = load(tmp_path / "results.json")
    assert table(again) == table(results)
    assert again.machine == results.machine


def test_only_the_generated_part_of_the_page_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = replaced(page, generated(_results()))
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "old" not in new
    assert "| nginx 1 | 20.0 |" in new
    with pytest.raises(ValueError, match="in the page"):
        replaced("no markers", "new")
