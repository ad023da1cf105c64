"""The Debian packages on a fresh Debian with a real systemd: install, first answer, upgrade, purge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.base_image import import_base_image
from tests.container.podman import private_podman, why_not
from tests.container.system import IMAGE, System, built_packages, running_system

SYSTEM_PACKAGES = "systemd,systemd-sysv,dbus,python3,ca-certificates,adduser,procps"
MODELS = """\
[[models]]
id = "m"
harness = "sim"
vram_mb = 4000
args = ["--tokens-per-sec", "20"]
"""
FILES = "find / -xdev -path /proc -prune -o -path /sys -prune -o -path /tmp -prune -o -print"

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = why_not()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the containers: {reason}")
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("packages")
    built_packages(directory, "1.0", "1.1")
    return directory


@pytest.fixture(scope="module")
def system(packages: Path) -> Iterator[System]:
    """A fresh Debian with the packages in /packages."""
    with private_podman() as podman:
        import_base_image(podman, IMAGE, SYSTEM_PACKAGES)
        with running_system(podman) as system:
            system.run("mkdir", "/packages")
            for package in packages.glob("*.deb"):
                system.copy(package, f"/packages/{package.name}")
            yield system


def test_from_a_fresh_debian_to_nothing_left(system: System, tmp_path: Path) -> None:
    """One life: each step needs the one before it."""
    files_before = set(system.shell(FILES).splitlines())
    users_before = system.run("cat", "/etc/passwd", "/etc/group")

    system.shell("dpkg --force-unsafe-io -i /packages/*_1.0_*.deb", timeout=300)
    assert system.run("systemctl", "is-active", "cortex", "neuron").split() == ["active", "active"]

    remove_and_install(system)
    first_answer(system, tmp_path)
    mistake_in_a_file(system)
    upgrade_under_load(system)
    purge(system)
    left = set(system.shell(FILES).splitlines()) - files_before
    assert [
        path for path in sorted(left) if not re.match(r"/(var/log|run|packages|dev|var/lib/dpkg|etc/[^/]+-)", path)
    ] == []
    assert system.run("cat", "/etc/passwd", "/etc/group") == users_before
    assert system.shell("pgrep -fa '[c]ortex|[n]euron' || true") == ""


def remove_and_install(system: System) -> None:
    """Enabled is what was enabled before."""
    system.run("systemctl", "disable", "neuron")
    system.run("dpkg", "--remove", "cortex", "neuron", timeout=300)
    assert system.shell("systemctl is-active cortex neuron || true").split() == ["inactive", "inactive"]
    system.shell("dpkg --force-unsafe-io -i /packages/*_1.0_*.deb", timeout=300)
    assert system.shell("systemctl is-enabled cortex neuron || true").split() == ["enabled", "disabled"]
    assert system.shell("systemctl is-active cortex neuron || true").split() == ["active", "inactive"]
    system.run("systemctl", "enable", "--now", "neuron")
    assert system.shell("ls -A /etc/cortex /etc/neuron | grep removal || true") == ""


def first_answer(system: System, scratch: Path) -> None:
    """The operator adds a simulated GPU and a model; cortex notices by itself."""
    system.copy(Path(__file__).with_name("package_clients.py"), "/packages/clients.py")
    neuron = system.run("cat", "/etc/neuron/neuron.toml").replace('name = "vllm"', 'name = "sim"')
    system.write("/etc/neuron/neuron.toml", f'{neuron}\n[simulate]\ndevices = ["RTX 4090"]\n', scratch)
    system.run("systemctl", "restart", "neuron")
    system.write("/etc/cortex/models.toml", MODELS, scratch)
    cortex = system.run("cat", "/etc/cortex/cortex.toml")
    assert "[poll]" not in cortex.splitlines()
    # On a busy machine neuron may need more than the default of three polls to start again.
    system.write("/etc/cortex/cortex.toml", f"{cortex}\n[poll]\nunhealthy_after = 30\n", scratch)
    system.run("systemctl", "restart", "cortex")
    ask = "import sys; sys.path.insert(0, '/packages'); import clients; print(clients.ask(stream=False, tokens=3))"
    assert "choices" in system.run("python3", "-c", ask)


def mistake_in_a_file(system: System) -> None:
    """The service stays down at once, and its status says why."""
    system.run("sed", "-i", "s/^listen/lisen/", "/etc/cortex/cortex.toml")
    status = system.shell("systemctl restart cortex || systemctl status --lines=10 cortex || true")
    assert "/etc/cortex/cortex.toml: gateway.lisen: unknown key" in status
    assert system.run("systemctl", "show", "--value", "--property=NRestarts,Result", "cortex").split() == [
        "exit-code",
        "0",
    ]
    system.run("sed", "-i", "s/^lisen/listen/", "/etc/cortex/cortex.toml")
    system.run("systemctl", "start", "cortex")


def upgrade_under_load(system: System) -> None:
    """Streams and requests go on over the upgrade of both; the engine is the same process after it."""
    engine = "pgrep -u neuron -o -f 'neuron[.]sim'"
    before = system.main_pid("cortex"), system.main_pid("neuron"), system.shell(engine)
    script = """
        rm -f /tmp/stop; python3 /packages/clients.py /tmp/stop >/tmp/clients & clients=$!
        dpkg --force-unsafe-io -i /packages/*_1.1_*.deb >/tmp/upgrade 2>&1 || { cat /tmp/upgrade; exit 1; }
        touch /tmp/stop; wait $clients; cat /tmp/clients"""
    result = json.loads(system.shell(script, timeout=400))
    assert result["failures"][:5] == []
    assert result["streams"] > 0
    assert result["short"] > 0
    after = system.main_pid("cortex"), system.main_pid("neuron"), system.shell(engine)
    assert after[0] not in (0, before[0])
    assert after[1] not in (0, before[1])
    assert after[2] == before[2]
    errors = system.shell("journalctl -u cortex -u neuron -o cat | grep -E 'ERROR|Traceback' || true")
    assert errors == ""
    assert '"m"' in system.run("cat", "/etc/cortex/models.toml")  # the operator's file stays


def purge(system: System) -> None:
    created = system.shell("cortex keys create k --config /etc/cortex/cortex.toml")
    assert "sk-cortex-" in created
    system.run("dpkg", "--purge", "cortex", "neuron", timeout=300)
