"""A private Podman: its storage, networks and state are in one directory, separate from any other Podman's."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.environment.cache import EnvironmentUnavailable, cache_root, locked
from tests.environment.commands import run

_PROGRAMS = ("podman", "buildah", "runc", "netavark", "debootstrap", "iptables")
_EXTRA_PATH = "/usr/lib/podman:/usr/sbin:/sbin"

# runc, cgroupfs, vfs and log files work on every kernel, without systemd and inside a container; the limits are low
# enough for an unprivileged start. Locks are files because the default is one shared-memory segment per machine.
_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=1000:1000"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{root}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{root}/networks"
"""
_STORAGE_CONF = """\
[storage]
driver = "vfs"
graphroot = "{root}/storage"
runroot = "{root}/run"
"""


def why_not() -> str | None:
    """Why containers cannot run here, None if they can."""
    if os.geteuid() != 0:
        return "the container tests need root"
    path = f"{os.environ['PATH']}:{_EXTRA_PATH}"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    return f"not installed: {', '.join(missing)} (.ci/run names the Debian packages)" if missing else None


class Podman:
    """Runs podman and podman-compose with the settings in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        conf, storage = root / "containers.conf", root / "storage.conf"
        conf.write_text(_CONTAINERS_CONF.format(root=root), encoding="utf-8")
        storage.write_text(_STORAGE_CONF.format(root=root), encoding="utf-8")
        self._env = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:{_EXTRA_PATH}",
            "CONTAINERS_CONF": str(conf),
            "CONTAINERS_STORAGE_CONF": str(storage),
            "BUILDAH_ISOLATION": "chroot",  # the default isolation needs privileges that a container lacks
        }

    def __call__(self, *arguments: str | Path, timeout: float = 120) -> str:
        """Runs `podman ARGUMENTS` and returns its output.

        Raises:
            EnvironmentUnavailable: it failed; the message has its last output lines.
        """
        return run(["podman", *arguments], timeout=timeout, env=self._env)

    def compose(self, *arguments: str | Path, env: Mapping[str, str], timeout: float = 300) -> str:
        """Runs `podman-compose ARGUMENTS` with `env` added to the environment, for the compose file."""
        command = [sys.executable, "-m", "podman_compose", "--no-ansi", *arguments]
        return run(command, timeout=timeout, env={**self._env, **env})

    def names(self, *listing: str) -> set[str]:
        """The names in a listing such as `ps --all`."""
        field = "{{.Name}}" if listing[0] == "network" else "{{.Names}}"
        return set(self(*listing, "--format", field).split())

    def processes(self) -> dict[int, str]:
        """Live processes with this Podman's directory in their command line, such as monitors: pid -> command."""
        found: dict[int, str] = {}
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has exited
            if str(self.root) in command:
                found[int(entry.parent.name)] = command
        return found


@contextmanager
def private_podman() -> Iterator[Podman]:
    """A Podman with empty storage, for one test run at a time. Removes what a killed run left first."""
    with locked("containers"):
        root = cache_root() / "containers"
        root.mkdir(exist_ok=True)
        podman = Podman(root)
        _empty(podman)
        try:
            yield podman
        finally:
            _empty(podman)


def _empty(podman: Podman) -> None:
    if (podman.root / "storage").exists():
        podman("rm", "--all", "--force", "--time", "2")
        podman("network", "prune", "--force")
    for name in ("storage", "run", "tmp", "networks"):
        shutil.rmtree(podman.root / name, ignore_errors=True)
        if (podman.root / name).exists():
            raise EnvironmentUnavailable(f"{podman.root / name} cannot be removed; is something still mounted there?")
