"""Ports for tests: no two processes get the same one."""

from __future__ import annotations

import socket
import subprocess
import sys

from tests.ports import FIRST, LAST, free_port

MANY = "from tests.ports import free_port\nfor _ in range(50): print(free_port())"


def test_processes_side_by_side_get_different_ports() -> None:
    running = [subprocess.Popen([sys.executable, "-c", MANY], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    ports = [int(port) for process in running for port in process.communicate(timeout=60)[0].split()]
    assert len(set(ports)) == len(ports) == 200
    assert all(FIRST <= port <= LAST for port in ports)


def test_taken_ports_are_skipped() -> None:
    following = free_port() + 1
    with socket.create_server(("127.0.0.1", following if following <= LAST else FIRST)) as taken:
        assert free_port() != taken.getsockname()[1]
