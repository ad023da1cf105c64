"""Runs clients as programs of their own, each with an empty home."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECS = 50
# No client may call home, look for updates or find the settings of the user who runs the tests.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
}


def client_environment(directory: Path) -> dict[str, str]:
    """Variables for a client whose home is `directory`/home."""
    home = directory / "home"
    home.mkdir()
    return {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(directory), "LANG": "C.UTF-8", **_QUIET}


@dataclass(frozen=True)
class Printed:
    """What a client printed. `json` is its last line as JSON."""

    out: str
    errors: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.strip().rpartition("\n")[2])


def run_client(
    command: Sequence[str | Path], env: Mapping[str, str], *, cwd: Path | None = None, status: int = 0
) -> Printed:
    """Runs a client to its end. `cwd` None: its home. Fails unless it exits with `status`."""
    done = subprocess.run(
        list(map(str, command)), env=dict(env), cwd=cwd or env["HOME"], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=TIMEOUT_SECS, check=False,
    )  # fmt: skip
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Printed(done.stdout, done.stderr)


@dataclass(frozen=True)
class PythonClients:
    """Packages from PyPI; `directory` has the commands."""

    directory: Path
    env: Mapping[str, str]

    def run(self, program: str, *arguments: str) -> Any:
        """What a program prints as JSON; `arguments` are its sys.argv[1:]."""
        return run_client([self.directory / "python", "-c", program, *arguments], self.env).json


@dataclass(frozen=True)
class NodeClients:
    """Packages from npm; `directory` has their `node_modules`."""

    directory: Path
    env: Mapping[str, str]

    def command(self, name: str) -> Path:
        return self.directory / "node_modules" / ".bin" / name

    def run(self, program: str, *arguments: str) -> Any:
        """What a module prints as JSON; `arguments` are its process.argv.slice(1). It runs beside node_modules, so that
        it can import the packages by name."""
        command = ["node", "--input-type=module", "--eval", program, *arguments]
        return run_client(command, self.env, cwd=self.directory).json
