"""Runs a client as a process of its own: a new home, nothing to reach but loopback, and a report to read."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.processes import eventually
from tests.services import Fleet

TOP = Path(__file__).parents[2]
MODELS = ("sim/first", "sim/second")
CHAT_ONLY = ("sim/chat-only", "sim/chat-only-405")
"""Their engines answer 404 and 405 to everything but chat completions, which cortex translates to."""
SLOW = "sim/slow"
SLOW_LOAD_SECS = 5.0
BROKEN = {agent: f"sim/broken-for-{agent}" for agent in ("claude", "codex", "opencode")}
"""They never load. One for each agent, since after a failure the next request is refused at once."""
TEXT_CASES = ("cold_stream", "cold_plain", "warm_stream", "warm_plain")
TOOL_CASES = ("tool_stream", "tool_plain")
TIMEOUT_SECS = 200
"""A client that hangs is ended. On a busy machine codex with a real vLLM was not done after 50 s."""


@dataclass
class Outside:
    """A proxy for everything but loopback that lets nothing pass. Clients that honour the proxy variables ask it."""

    url: str
    asked: list[str] = field(default_factory=list)
    """The request lines so far."""


@contextmanager
def outside() -> Iterator[Outside]:
    """The proxy, on a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Outside(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def refuse() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # closed
                    return
                with client:
                    client.settimeout(5)
                    line = client.recv(4096).partition(b"\r\n")[0]
                    if line:
                        proxy.asked.append(line.decode("latin-1"))
                        client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        yield proxy
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@dataclass(frozen=True)
class Bench:
    """What every client is run with: the fleet, a home directory, and the proxy that shows calls to the Internet."""

    fleet: Fleet
    home: Path
    proxy: Outside
    models: tuple[str, str] = MODELS

    @property
    def url(self) -> str:
        """Where cortex listens, without a path."""
        return self.fleet.cortex.url

    def cold(self, *models: str) -> None:
        """Unloads the models: the next request for one of them loads it."""
        for model in models or self.models:
            # A client that gave up leaves a load behind.
            eventually(partial(self._settled, model), f"{model} has been loaded", within_secs=20)
            if self._status(model) == "loaded":
                answer = self.fleet.unload(model)
                assert answer.status == 200, answer
            assert self._status(model) == "unloaded"

    def _settled(self, model: str) -> bool:
        return self._status(model) in ("loaded", "unloaded")

    def _status(self, model: str) -> str:
        entry = self.fleet.status_of(model)
        return "unloaded" if entry is None else str(entry["status"])

    def run(self, command: Sequence[str | Path], **environment: str) -> str:
        """What the client printed to standard output.

        Fails when it exits with anything but 0, or asks for a host outside.
        """
        done = self.attempt(command, **environment)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def attempt(self, command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the client, whatever its exit code; fails when it asks for a host outside.

        Nothing that it started is left, not even after a timeout.
        """
        before = len(self.proxy.asked)
        words = [str(word) for word in command]
        process = subprocess.Popen(
            words,
            cwd=self.home,
            env={**self._environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                output, errors = process.communicate(timeout=TIMEOUT_SECS)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert self.proxy.asked[before:] == [], f"it asked for hosts outside\n{output}\n{errors}"
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def _environment(self) -> Mapping[str, str]:
        proxy = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), self.proxy.url)
        loopback = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8", **proxy, **loopback}


@dataclass(frozen=True)
class Report:
    """What a script of tests/clients/scripts printed: a result for each case."""

    results: Mapping[str, Any]
    models: tuple[str, str] = MODELS

    def text(self, case: str) -> str:
        """The answer of a case; of a streamed one, after checking that it came in pieces."""
        result = self._result(case)
        if case.endswith("stream"):
            assert isinstance(result, list), result
            assert len(result) > 5, result
            result = "".join(result)
        assert isinstance(result, str), result
        return result

    def check_text(self, case: str) -> None:
        """The whole answer of the simulated model that was asked."""
        model = self.models[1] if case in ("cold_plain", "warm_plain") else self.models[0]
        text = self.text(case)
        assert text.startswith(f'{model} (simulated): "Who are you?" Every word'), text
        assert text.endswith("cuts it short."), text

    def check_tool(self, case: str) -> None:
        assert self._result(case) == ["get_weather", {"city": "Paris"}]

    def check_models(self) -> None:
        """The library found the model in the list of models."""
        assert self._result("models") == [self.models[0]]

    def _result(self, case: str) -> Any:
        result = self.results[case]
        if isinstance(result, dict) and "error" in result:
            raise AssertionError(result["error"])
        return result


def report_of(bench: Bench, command: Sequence[str | Path], **environment: str) -> Report:
    """Runs a script, both models cold, and reads its report."""
    bench.cold()
    output = bench.run([*command, bench.url, *bench.models], **environment)
    return Report(json.loads(output.splitlines()[-1]), bench.models)


def python_report(bench: Bench, python: Path, script: str, **environment: str) -> Report:
    """The report of a Python script, by module name."""
    command: list[str | Path] = [python, "-m", f"tests.clients.scripts.{script}"]
    return report_of(bench, command, PYTHONPATH=str(TOP), PYTHONDONTWRITEBYTECODE="1", **environment)
