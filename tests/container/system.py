"""A fresh Debian with a real systemd in a container, and the two packages of this checkout."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.container.podman import Podman
from tests.environment.cache import EnvironmentUnavailable, key_of, prepared
from tests.environment.commands import run

TOP = Path(__file__).parents[2]
BUILDER = TOP / "deploy/debian/build.py"
IMAGE = "localhost/cortex-neuron-system"
CONTAINER = "system"
PYTHON = "/usr/bin/python3"


def built_packages(directory: Path, *versions: str) -> list[Path]:
    """The two packages of each version, in `directory`, of this checkout's code as plain Python. The first time it
    takes a minute and needs a network.

    Raises:
        EnvironmentUnavailable: they cannot be built.
    """
    project = (TOP / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = project.partition("dependencies = [")[2].partition("\n]")[0]
    requirements = re.findall(r'^\s+"(.+)",$', dependencies, re.MULTILINE)
    key = key_of(*requirements, run([PYTHON, "-VV"], timeout=20))

    def build(made: Path) -> None:
        run([PYTHON, "-m", "venv", "--without-pip", made / "venv"], timeout=60)
        install(made / "venv", *requirements)

    environment = directory / "environment"
    shutil.copytree(prepared(f"debian-environment-{key}", build) / "venv", environment, symlinks=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*wheel, "--wheel-dir", directory, TOP], timeout=120, env={**os.environ, "CORTEX_COMPILE": "no"})
    install(environment, "--no-deps", str(next(directory.glob("*.whl"))))
    first, *others = versions
    builder: list[str | Path] = [sys.executable, BUILDER, "--environment", environment, "--output", directory]
    run([*builder, "--version", first], timeout=300)
    for package in sorted(directory.glob("*.deb")):
        root = directory / package.stem
        run(["dpkg-deb", "-R", package, root], timeout=120)
        control = (root / "DEBIAN/control").read_text(encoding="utf-8")
        for version in others:
            changed = control.replace(f"Version: {first}\n", f"Version: {version}\n")
            (root / "DEBIAN/control").write_text(changed, encoding="utf-8")
            run(["dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "-b", root, directory], timeout=120)
        shutil.rmtree(root)
    return sorted(directory.glob("*.deb"))


def install(environment: Path, *arguments: str) -> None:
    """`pip install` for another environment's Python."""
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    run([*pip, "--no-compile", *arguments], timeout=600)


class System:
    """The running container."""

    def __init__(self, podman: Podman) -> None:
        self._podman = podman

    def run(self, *command: str, timeout: float = 120) -> str:
        """The output of a command as root.

        Raises:
            EnvironmentUnavailable: it failed; the message has its last lines.
        """
        return self._podman("exec", CONTAINER, *command, timeout=timeout)

    def shell(self, script: str, timeout: float = 120) -> str:
        """`run` for a line of shell."""
        return self.run("sh", "-ec", script, timeout=timeout)

    def copy(self, source: Path, target: str) -> None:
        self._podman("cp", source, f"{CONTAINER}:{target}")

    def write(self, path: str, text: str, scratch: Path) -> None:
        """Replaces a file."""
        (scratch / "written").write_text(text, encoding="utf-8")
        self.copy(scratch / "written", path)

    def main_pid(self, service: str) -> int:
        return int(self.run("systemctl", "show", "--value", "--property=MainPID", service))


@contextlib.contextmanager
def running_system(podman: Podman) -> Iterator[System]:
    """A container of `IMAGE` whose systemd has started.

    Raises:
        EnvironmentUnavailable: it does not start here.
    """
    podman(
        "run",
        "--name",
        CONTAINER,
        "--detach",
        "--systemd=always",
        "--privileged",
        "--network=none",
        IMAGE,
        "/sbin/init",
    )
    try:
        system, deadline = System(podman), time.monotonic() + 60
        while True:
            try:
                system.run("systemctl", "is-system-running", "--wait")
                break
            except EnvironmentUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield system
    finally:
        podman("rm", "--force", "--time", "2", CONTAINER)
