"""Runs set-up commands; the error has the last output lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.environment.cache import EnvironmentUnavailable

_LAST_LINES = 15


def run(command: Sequence[str | Path], *, timeout: float, env: Mapping[str, str] | None = None) -> str:
    """What the command printed to standard output; `timeout` in seconds, `env` replaces the environment.

    Raises:
        EnvironmentUnavailable: the command is missing, failed or timed out.
    """
    words = [str(word) for word in command]
    brief = " ".join(words[:4])
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
    except FileNotFoundError as error:
        raise EnvironmentUnavailable(f"{words[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentUnavailable(f"{brief} …: timed out after {timeout:.0f} s") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-_LAST_LINES:])
        raise EnvironmentUnavailable(f"{brief} …: exit code {done.returncode}\n{tail}")
    return done.stdout


def make_environment(directory: Path, requirements: Sequence[str], *, timeout: float = 900) -> Path:
    """A virtual environment with these packages; its Python.

    Raises:
        EnvironmentUnavailable: venv or pip failed or timed out.
    """
    python = directory / "bin" / "python"
    run([sys.executable, "-m", "venv", directory], timeout=120)
    run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *requirements], timeout=timeout)
    return python
