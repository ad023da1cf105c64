"""Runs `cortex doctor` as a user does, with a cortex.toml for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tests.services import NODE, TOKEN, Fleet

TOP = Path(__file__).parents[4]
NEURON = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090"]}}
CATALOGUE = {"models": [{"id": "m", "harness": "sim", "vram_mb": 1000, "args": ["--load-secs", "0.1"]}]}


class Report:
    """What doctor found."""

    def __init__(self, ended: subprocess.CompletedProcess[str]) -> None:
        self.status = ended.returncode
        assert ended.stderr == ""
        self.findings = json.loads(ended.stdout)["findings"]
        assert json.loads(ended.stdout)["ok"] == (self.status == 0)

    def of(self, verdict: str) -> list[str]:
        """The findings of this verdict, each as a line without it."""
        return [
            f"{each['subject']}: {each['text']}" + (f"; {each['advice']}" if each["advice"] else "")
            for each in self.findings
            if each["verdict"] == verdict
        ]


def doctor(config: Path, *arguments: str, token: str | None = TOKEN, prefix: tuple[str, ...] = ()) -> Report:
    return Report(command(config, *arguments, "--json", token=token, prefix=prefix))


def command(
    config: Path, *arguments: str, token: str | None = TOKEN, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    options, environment = _started(config, arguments, token)
    return subprocess.run(
        [*prefix, *options], env=environment, cwd=TOP, capture_output=True, text=True, timeout=50, check=False
    )


def doctor_process(config: Path, *arguments: str, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    """Doctor while it runs."""
    options, environment = _started(config, arguments, TOKEN)
    return subprocess.Popen(options, env=environment, cwd=TOP, stdout=stdout, stderr=stderr)


def _started(config: Path, arguments: Sequence[str], token: str | None) -> tuple[list[str], dict[str, str]]:
    """The command line and its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CORTEX_", "NEURON_"))}
    if token is not None:
        environment["NEURON_TOKEN"] = token
    return [sys.executable, "-m", "cortex", "doctor", "--config", str(config), *arguments], environment


def config_file(tmp_path: Path, fleet: Fleet | None = None, **tables: Any) -> Path:
    """A cortex.toml of a cortex that does not run, with the neuron of the fleet."""
    entry = {"name": NODE, "endpoint": "" if fleet is None else fleet.neuron.url, "token_env": "NEURON_TOKEN"}
    table: dict[str, Any] = {
        "gateway": {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"},
        "state_dir": str(tmp_path / "state"),
        "neurons": [] if fleet is None else [entry],
        **tables,
    }
    (tmp_path / "cortex.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    (tmp_path / "models.toml").write_text(tomli_w.dumps(CATALOGUE), encoding="utf-8")
    return tmp_path / "cortex.toml"
