"""Runs one part of an engine that spans hosts with Ray: a node of a Ray cluster that only this engine uses.

A program of its own, with the standard library alone: `ray` and vLLM are in another environment. Everything it starts
stays in its session, also Ray's workers, so neuron finds and ends them like vLLM's own processes. Exits with the status
of what ended first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_POLL_SECS = 0.2
_STOP_SECS = 10.0
_SHOWN_BYTES = 4000
"""Of Ray's output when it ends before the engine."""


def main(words: Sequence[str]) -> int:
    """`words`: see the parser. Without `engine` the node joins the cluster at the address; with it, it is the head."""
    parser = argparse.ArgumentParser(prog="ray_node", description="One Ray node, and on the head the engine.")
    parser.add_argument("--ray", required=True, help="the ray command")
    parser.add_argument("--address", required=True, help="of the head, as HOST:PORT")
    parser.add_argument("--own-address", required=True)
    parser.add_argument("--gpus", required=True)
    parser.add_argument("--temp-dir")
    parser.add_argument("--log", help="file for Ray's output on the head")
    parser.add_argument("engine", nargs="*")
    given = parser.parse_args(words)
    host, _, port = given.address.rpartition(":")
    start = [given.ray, "start", "--block", "--disable-usage-stats", "--num-gpus", given.gpus]
    start += ["--node-ip-address", given.own_address]
    start += ["--temp-dir", given.temp_dir] if given.temp_dir else []
    if given.engine:
        head = ["--head", "--port", port, "--include-dashboard", "false"]
        return _run_head([*start, *head], given.engine, (given.own_address, int(port)), Path(given.log))
    while not _answers(host.strip("[]"), int(port)):
        time.sleep(_POLL_SECS)
    return os.execvp(given.ray, [*start, "--address", given.address])  # noqa: S606 - no shell is meant


def _run_head(start: Sequence[str], engine: Sequence[str], address: tuple[str, int], log: Path) -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    with log.open("wb") as output:
        ray = subprocess.Popen(start, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    children = [ray]
    try:
        while not asked and ray.poll() is None and not _answers(*address):
            time.sleep(_POLL_SECS)
        if not asked and ray.poll() is None:
            # vLLM itself waits until the other nodes have brought their GPUs.
            children.insert(0, subprocess.Popen(engine))
        while not asked and all(child.poll() is None for child in children):
            time.sleep(_POLL_SECS)
        if ray.returncode is not None:
            text = log.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace")
            sys.stderr.write(f"{text}\nRuntimeError: the Ray node exited with status {ray.returncode}\n")
        return children[0].returncode or (0 if asked else 1)
    finally:
        for child in children:  # vLLM first: it talks to its workers through Ray
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        child.wait(_STOP_SECS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
