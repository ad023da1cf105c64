"""Runs a preparing command; a failure carries its last words."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.environment.cache import EnvironmentUnavailable

_LAST_LINES = 15


def run(command: Sequence[str | Path], *, timeout: float, env: Mapping[str, str] | None = None) -> str:
    """What the command printed, both streams together; `timeout` in seconds, `env` replaces the environment.

    Raises:
        EnvironmentUnavailable: it is not there, failed or took too long.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env=env,
            check=False,
        )
    except FileNotFoundError as error:
        raise EnvironmentUnavailable(f"{words[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentUnavailable(f"{' '.join(words[:4])} …: no end after {timeout:.0f} s") from error
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise EnvironmentUnavailable(f"{' '.join(words[:4])} …: exit code {done.returncode}\n{tail}")
    return done.stdout
