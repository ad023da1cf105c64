"""The service units match the services."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cortex.config.gateway import GatewaySettings
from cortex.config.settings import CortexConfig
from neuron.config import NeuronConfig

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"


def service(name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign, assignment]  # systemd's keys are case-sensitive
    parser.read(UNITS / f"{name}.service")
    return parser["Service"]


def most_workers() -> int:
    most: int = GatewaySettings.model_json_schema()["properties"]["workers"]["maximum"]
    return most


def test_systemd_waits_longer_than_the_services_drain() -> None:
    """A shorter timeout would let systemd cut running answers."""
    assert int(service("cortex")["TimeoutStopSec"]) > CortexConfig().gateway.drain_timeout_secs
    engines = NeuronConfig().harness_settings("vllm").stop_timeout_secs
    assert int(service("neuron")["TimeoutStopSec"]) > NeuronConfig().drain_timeout_secs + engines


def test_only_the_service_itself_gets_the_first_signal() -> None:
    """The service drains itself. Nothing survives cortex; engines survive neuron, and the next one adopts them."""
    assert service("cortex")["KillMode"] == "mixed"
    assert service("neuron")["KillMode"] == "process"


def test_cortex_can_be_reloaded_and_keeps_its_state() -> None:
    """The unit's settings match what cortex expects."""
    assert service("cortex")["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service("cortex")["StateDirectory"] == "cortex"


def test_a_restart_keeps_the_listening_sockets() -> None:
    """tests/cortex/cli/test_restart.py tests what cortex does with these settings."""
    assert service("cortex")["RestartKillSignal"] == "SIGUSR2"
    assert "KillSignal" not in service("cortex")  # SIGTERM
    assert service("cortex")["Type"] == "notify"
    assert int(service("cortex")["FileDescriptorStoreMax"]) >= most_workers()  # a socket each


@pytest.mark.parametrize("name", ["cortex", "neuron"])
def test_a_mistake_in_the_files_is_not_tried_again(name: str) -> None:
    """Five starts would push what is wrong out of the lines that `systemctl status` shows."""
    assert int(service(name)["RestartPreventExitStatus"]) == os.EX_CONFIG
    assert "ExecStartPre" not in service(name)  # systemd ignores the exit status of such a command here


@pytest.mark.parametrize("name", ["cortex", "neuron"])
def test_a_long_start_is_not_killed(name: str) -> None:
    """Type=notify counts all of it: a migration of the database, or engines that the neuron before left."""
    assert service(name)["Type"] == "notify"
    assert service(name)["TimeoutStartSec"] == "infinity"


def test_the_recorder_of_usage_may_be_nice() -> None:
    """systemd counts setpriority among @resources, which cortex may not use otherwise."""
    lines = (UNITS / "cortex.service").read_text(encoding="utf-8").splitlines()
    filters = [line.partition("=")[2] for line in lines if line.startswith("SystemCallFilter=")]
    assert filters[-2:] == ["~@privileged @resources", "setpriority"]


def test_nothing_of_a_neuron_that_stops_is_taken_from_its_engines() -> None:
    """They continue in its mount namespace, and share memory."""
    assert not {"PrivateTmp", "RuntimeDirectory", "RemoveIPC", "DynamicUser"} & set(service("neuron"))


def test_engines_reach_the_gpus() -> None:
    """ProtectClock= counts: it adds a DeviceAllow= line, and with one of these every other device is denied."""
    assert not {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"} & set(service("neuron"))
    assert "MemoryDenyWriteExecute" not in service("neuron")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_cortex_can_do_little_besides_its_work() -> None:
    """`--threshold` is ten times the exposure that the last line shows."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager"]
    done = subprocess.run([*command, UNITS / "cortex.service"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", ["cortex", "neuron"])
def test_systemd_understands_every_line(name: str, tmp_path: Path) -> None:
    """systemd ignores misspelt keys."""
    unit = tmp_path / f"{name}.service"
    text = (UNITS / unit.name).read_text(encoding="utf-8")
    unit.write_text(re.sub(r"/usr/bin/(cortex|neuron) ", r"/bin/echo \1 ", text), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if unit.name in line] == []
