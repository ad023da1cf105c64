"""`python -m tests.gpu` against the compiled NVML: what needs only the driver passes, the rest says what it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nvml.library import REPOSITORY, Gpu, build_library, uuid_of, write_scenario

SICK = {"clock_reasons": 0x40, "energy_mj": 1000, "recovery_action": 0}


def test_the_report_has_results_reasons_and_facts(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In the file and on the screen, with the host's GPUs."""
    library = build_library(tmp_path_factory.getbasetemp() / "nvml")
    scenario = write_scenario(tmp_path / "gpus", (Gpu(used_mib=512), Gpu(figures=SICK)))
    environ = {name: value for name, value in os.environ.items() if name != "CORTEX_TEST_GPU_VLLM"}
    environ |= {**library, **scenario, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    file = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--output", str(file), "-q", "tests/gpu"],
        cwd=REPOSITORY,
        env=environ,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    tests = {each["test"].rpartition("::")[2]: each for each in report["tests"]}
    outcomes = {name: each["outcome"] for name, each in tests.items()}
    assert outcomes["test_every_gpu_tells_its_facts"] == "passed"
    assert outcomes["test_xid_events_can_be_listened_to"] == "passed"
    assert tests["test_xid_events_can_be_listened_to"]["facts"]["watched"] == [0, 1]
    assert "too hot" in str(tests["test_flags_of_the_driver"]["facts"]["warnings of GPU 1"])
    assert outcomes["test_one_engine_on_two_gpus"] == "skipped"
    assert tests["test_one_engine_on_two_gpus"]["why"].startswith("no vLLM for GPUs")
    assert [device["uuid"] for device in report["host"]["discovery"]["devices"]] == [uuid_of(0), uuid_of(1)]
    assert "PASSED   tests/gpu/test_driver.py::test_flags_of_the_driver" in done.stdout
    assert str(file) in done.stdout
