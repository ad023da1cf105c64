"""Sick GPUs through NVML: the real nvidia-ml-py in a real process, against a real shared library with an event set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.nvml.library import GPU_IS_LOST, NOT_SUPPORTED, UNKNOWN, Gpu, build_library, write_scenario
from tests.nvml.probe import Probe, probing

PAIR = (Gpu(), Gpu())
RESET, DRAIN_AND_RESET = 1, 4
POWER_BRAKE, HOT, POWER_CAP = 0x80, 0x40, 0x4


def after_xids(
    probe: Probe,
    hardware: Path,
    *events: tuple[int, int],
    gpus: tuple[Gpu, ...] = PAIR,
    keys: Mapping[str, object] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The live figures once the driver has reported these events: (GPU, Xid). One of the last GPU, after all others,
    shows that they have been taken."""
    everything = [*events, (len(gpus) - 1, 48)]
    numbered = {f"event__{number}": f"{gpu} {xid}" for number, (gpu, xid) in enumerate(everything)}
    write_scenario(hardware, gpus, **numbered, **keys)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        health: list[dict[str, Any]] = probe.ask("health")
        if health[-1]["fault"] is not None:
            return health
        time.sleep(0.05)
    raise AssertionError("the event was not taken within 20 s")


def one(probe: Probe, hardware: Path, figures: Mapping[str, object], **keys: object) -> dict[str, Any]:
    """The live figures of the first GPU of a pair, with these `figures`."""
    write_scenario(hardware, (Gpu(figures=figures), Gpu()), **keys)
    health: dict[str, Any] = probe.ask("health")[0]
    return health


def test_a_fatal_xid_takes_the_gpu_out_of_use(library: dict[str, str], hardware: Path) -> None:
    """The reason has the number and what it means."""
    xids = (46, 48, 62, 64, 74, 79, 95, 119, 120, 140)
    gpus = (Gpu(),) * (len(xids) + 1)
    with probing(library | write_scenario(hardware, gpus)) as probe:
        probe.ask("discover")
        *sick, _ = after_xids(probe, hardware, *enumerate(xids), gpus=gpus)
        assert [each["fault"].split(":")[0] for each in sick] == [f"Xid {xid}" for xid in xids]
        assert sick[xids.index(79)]["fault"] == "Xid 79: the GPU has fallen off the bus"


def test_xids_of_a_program_and_of_the_log_leave_the_gpu_in_use(library: dict[str, str], hardware: Path) -> None:
    """Those that the engine caused are the engine's; others are only told."""
    with probing(library | write_scenario(hardware, PAIR)) as probe:
        probe.ask("discover")
        health = after_xids(
            probe, hardware, (0, 13), (0, 31), (0, 43), (0, 45), (0, 109), (0, 63), (0, 92), (0, 94), (0, 9999)
        )
        assert health[0]["fault"] is None
        assert [warning.split(":")[0] for warning in health[0]["warnings"]] == ["Xid 63", "Xid 92", "Xid 94"]
        assert {int(xid): count for xid, count in health[0]["xids"].items()} == dict.fromkeys(
            (13, 31, 43, 45, 63, 92, 94, 109, 9999), 1
        )


def test_a_contained_error_is_a_fault_if_the_driver_wants_a_reset(library: dict[str, str], hardware: Path) -> None:
    with probing(library | write_scenario(hardware, PAIR)) as probe:
        probe.ask("discover")
        health = after_xids(probe, hardware, (0, 94), keys={"gpu0.recovery_action": RESET})
        assert health[0]["fault"] == "the driver says that the GPU needs a reset"


@pytest.mark.parametrize("way", ["action", "energy", "gone"])
def test_a_reset_ends_the_fault(library: dict[str, str], hardware: Path, way: str) -> None:
    """The driver no longer asks for it, its counter of energy starts again, or the GPU comes back."""
    before = {"gpu0.recovery_action": RESET} if way == "action" else {"gpu0.energy_mj": 5_000_000}
    after = (
        {"gpu0.recovery_action": 0} if way == "action" else {"gpu0.energy_mj": 120 if way == "energy" else 6_000_000}
    )
    with probing(library | write_scenario(hardware, PAIR)) as probe:
        probe.ask("discover")
        assert after_xids(probe, hardware, (0, 79), keys=before)[0]["fault"]
        assert probe.ask("health")[0]["fault"]  # it lasts
        if way == "gone":
            write_scenario(hardware, PAIR, gpu0__error=UNKNOWN)
            assert [device["index"] for device in probe.ask("health")] == [1]
            write_scenario(hardware, PAIR, **before)
            assert probe.ask("health")[0]["fault"], "a passing error does not show a reset"
            write_scenario(hardware, PAIR, gpu0__error=GPU_IS_LOST)
            assert [device["index"] for device in probe.ask("health")] == [1]
        write_scenario(hardware, PAIR, **after)
        assert [device["fault"] is None for device in probe.ask("health")] == [True, False]


def test_a_gpu_that_the_driver_wants_reset_is_out_of_use(library: dict[str, str], hardware: Path) -> None:
    """Also without an event, as after a start of neuron: a restart alone does not make the GPU usable."""
    with probing(library | write_scenario(hardware, PAIR)) as probe:
        fault = one(probe, hardware, {"recovery_action": DRAIN_AND_RESET})["fault"]
        assert "drained and reset" in fault
        assert one(probe, hardware, {"recovery_action": 0})["fault"] is None


def test_what_is_only_told(library: dict[str, str], hardware: Path) -> None:
    """Memory errors, rows to remap, heat and the power brake are warnings; a power limit at work is normal."""
    figures = {"ecc_uncorrected": 2, "remapped_rows": "0 1 1 1", "clock_reasons": POWER_BRAKE | HOT | POWER_CAP}
    with probing(library | write_scenario(hardware, PAIR)) as probe:
        health = one(probe, hardware, figures)
        assert health["fault"] is None
        text = "\n".join(health["warnings"])
        for words in ("2 uncorrectable memory errors", "pending", "failed", "too hot", "power brake"):
            assert words in text
        assert len(health["warnings"]) == 5
        assert one(probe, hardware, {"ecc_uncorrected": 0, "remapped_rows": "3 0 0 0", "clock_reasons": POWER_CAP}) == {
            **health,
            "warnings": [],
        }


def test_a_driver_without_any_of_it(hardware: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An old driver lacks functions, and a GPU may refuse events: everything else works, and the process ends."""
    old = build_library(tmp_path_factory.getbasetemp() / "nvml", old_driver=True)
    refused = {"error.nvmlDeviceRegisterEvents": NOT_SUPPORTED}
    with probing(old | write_scenario(hardware, PAIR, **refused)) as probe:
        assert [(each["fault"], each["warnings"]) for each in probe.ask("health")] == [(None, []), (None, [])]
        assert "too hot" in one(probe, hardware, {"clock_reasons": HOT})["warnings"][0]


def test_events_after_a_wait_that_failed(library: dict[str, str], hardware: Path) -> None:
    """A wait fails while a GPU is off the bus: later events still arrive."""
    failing = {"error.nvmlEventSetWait_v2": GPU_IS_LOST}
    with probing(library | write_scenario(hardware, PAIR, **failing)) as probe:
        probe.ask("health")
        assert after_xids(probe, hardware, (0, 79))[0]["fault"]
