"""`cortex top`, `logs`, `chat`, `load` and `--watch` on a terminal and in a pipe."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.dev import Dev, running_dev
from tests.e2e.terminal import on_a_terminal

CORTEX = (sys.executable, "-m", "cortex")
MODEL = "Qwen/Qwen3-8B"


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    with running_dev("--fleet", "one=1xRTX4090") as dev:
        yield dev


def piped(dev: Dev, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """A command without a terminal, whose input is `text`."""
    command = [*CORTEX, *arguments, "--url", dev.url]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def test_a_load_shows_how_far_it_is(dev: Dev) -> None:
    with on_a_terminal(*CORTEX, "load", MODEL, CORTEX_URL=dev.url) as terminal:
        terminal.until(f"{MODEL} on one")
        assert terminal.ended() == 0
        terminal.until("loaded")
    assert json.loads(piped(dev, "load", MODEL, "--json").stdout)["status"] == "loaded"


def test_top(dev: Dev) -> None:
    """The screen follows the fleet; s sorts, q ends, and the terminal is as before."""
    with on_a_terminal(*CORTEX, "top", CORTEX_URL=dev.url) as terminal:
        terminal.until("1 of 1 hosts healthy", "0 RTX 4090", MODEL, "TOKENS/S")
        piped(dev, "unload", MODEL)
        piped(dev, "load", "small")
        terminal.until("one loaded", "tokens/s")
        terminal.press("s")
        terminal.until("now by running")
        terminal.press("q")
        assert terminal.ended() == 0


def test_top_on_a_small_terminal(dev: Dev) -> None:
    """No figure is cut and no row takes two lines; arrows scroll, which Escape alone ends."""
    with on_a_terminal(*CORTEX, "top", size=(8, 80), CORTEX_URL=dev.url) as terminal:
        terminal.until(" of 24 GiB", "TEMP  POWER", "scroll, lines 1 to 7 of 9")
        terminal.press("\x1b[B")
        terminal.until("scroll, lines 2 to 8 of 9")
        terminal.press("\x1b[A\x1bOBs")
        terminal.until("now by running   ↑ ↓ scroll, lines 2 to 8 of 9")
        terminal.press("\x1b")
        assert terminal.ended() == 0


def test_top_needs_a_terminal(dev: Dev) -> None:
    done = piped(dev, "top")
    assert (done.returncode, "top needs a terminal" in done.stderr) == (1, True)


def test_chat(dev: Dev) -> None:
    with on_a_terminal(*CORTEX, "chat", "small", CORTEX_URL=dev.url) as terminal:
        terminal.until("/quit or Ctrl-D ends", "> ")
        terminal.press("Hello\n")
        terminal.until("(simulated)", "s to the first token")
        terminal.press("/help\n/new\n/quit\n")
        assert terminal.ended() == 0
    done = piped(dev, "chat", "small", "Hello")
    assert (done.returncode, "Hello" in done.stdout, done.stderr) == (0, True, "")
    assert "made up" in piped(dev, "chat", "small", text="Hello\n").stdout
    told = json.loads(piped(dev, "chat", "small", "Hello", "--json").stdout)
    assert (told["model"], told["finish_reason"], told["stopped"]) == ("small", "stop", False)
    assert "made up" in told["answer"]
    assert 0 < told["first_token_secs"] <= told["secs"]
    done = piped(dev, "chat", "nope", "Hello")
    assert (done.returncode, "does not exist" in done.stderr) == (1, True)


def test_logs(dev: Dev) -> None:
    assert piped(dev, "load", "small").returncode == 0
    done = piped(dev, "logs", "small", "--tail", "2")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    done = piped(dev, "logs", "nope")
    assert (done.returncode, "does not exist" in done.stderr) == (1, True)
    with on_a_terminal(*CORTEX, "logs", "small", "-f", CORTEX_URL=dev.url) as terminal:
        terminal.until("startup complete")
        assert piped(dev, "unload", "small").returncode == 0
        terminal.until("one/0: the engine is gone")
        assert terminal.ended() == 0


def test_watch(dev: Dev) -> None:
    with on_a_terminal(*CORTEX, "status", "--watch", CORTEX_URL=dev.url) as terminal:
        terminal.until("NODE", "healthy")
        terminal.until("NODE")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ended() == 130
