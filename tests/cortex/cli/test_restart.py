"""A restart under systemd: its socket outlives cortex. The test plays systemd's part, with real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cortex.cli.listening import KEPT
from shared.system.service_manager import keep_sockets, notify_ready

TOP = Path(__file__).parents[3]
ASK = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


@dataclass
class Manager:
    """Keeps the sockets of one service, as systemd does."""

    directory: Path
    channel: socket.socket
    kept: dict[str, list[int]] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """`cortex serve`, ready. It gets what is kept."""
        passed = [(name, fd) for name, fds in self.kept.items() for fd in fds]
        moved = " ".join(f"{3 + number}<&{fd}" for number, (_, fd) in enumerate(passed))
        listen = f"LISTEN_PID=$$ LISTEN_FDS={len(passed)} LISTEN_FDNAMES={':'.join(name for name, _ in passed)}"
        command = f'exec {moved}; {listen} exec "$@"'
        with subprocess.Popen(
            ["bash", "-c", command, "-", sys.executable, "-m", "cortex", "serve", "--config", "cortex.toml"],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(TOP), "NOTIFY_SOCKET": str(self.directory / "notify")},
            pass_fds=[fd for _, fd in passed],
        ) as process:
            try:
                self.until("READY=1")
                yield process
            finally:
                process.kill()

    def until(self, wanted: str) -> None:
        """Does what cortex asks, up to a message that starts with `wanted`."""
        state = ""
        while not state.startswith(wanted):
            data, fds, _, _ = socket.recv_fds(self.channel, 4096, 256)
            state = data.decode()
            name = state.rpartition("FDNAME=")[2]
            if state.startswith("FDSTOREREMOVE=1"):
                for fd in self.kept.pop(name, []):
                    os.close(fd)
            elif state.startswith("FDSTORE=1"):
                self.kept.setdefault(name, []).extend(fds)

    def port(self) -> int:
        """The port of the first socket."""
        with socket.socket(fileno=os.dup(next(iter(self.kept.values()))[0])) as sock:
            return int(sock.getsockname()[1])

    def forget(self) -> None:
        for fds in self.kept.values():
            for fd in fds:
                os.close(fd)
        self.kept = {}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(50)
        manager = Manager(tmp_path, channel)
        yield manager
        manager.forget()


def configure(directory: Path, listen: str, workers: int = 1) -> None:
    (directory / "models.toml").write_text("", encoding="utf-8")
    (directory / "cortex.toml").write_text(
        f"""\
state_dir = "state"
[gateway]
listen = "{listen}"
metrics_listen = "127.0.0.1:0"
allow_anonymous = true
workers = {workers}
""",
        encoding="utf-8",
    )


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=50)


def status_of(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as answer:
        return answer.readline().split()[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_request_that_arrives_between_two_cortexes_is_answered(manager: Manager, workers: int) -> None:
    configure(manager.directory, "127.0.0.1:0", workers)
    with manager.running() as first:
        port = manager.port()
        assert [len(fds) for fds in manager.kept.values()] == [workers]
        first.send_signal(signal.SIGUSR2)
        assert first.wait(50) == 0
    waiting = [connected(port) for _ in range(8)]  # with two workers, some for each of their queues
    for connection in waiting:
        connection.sendall(ASK)
    configure(manager.directory, f"127.0.0.1:{port}", workers)
    with manager.running():
        assert {status_of(connection) for connection in waiting} == {b"200"}


def test_after_a_plain_stop_clients_are_refused(manager: Manager) -> None:
    """A load balancer sends them elsewhere at once."""
    configure(manager.directory, "127.0.0.1:0")
    with manager.running() as process:
        port = manager.port()
        process.send_signal(signal.SIGTERM)
        manager.until("FDSTOREREMOVE=1")
        assert process.wait(50) == 0
    assert manager.kept == {}
    with pytest.raises(ConnectionRefusedError):
        connected(port)


def test_a_changed_address_holds_after_the_restart(manager: Manager) -> None:
    configure(manager.directory, "127.0.0.1:0")
    with manager.running() as process:
        port = manager.port()
        process.send_signal(signal.SIGUSR2)
        assert process.wait(50) == 0
    configure(manager.directory, f"0.0.0.0:{port}")  # free only once the old socket is gone
    with manager.running():
        for host in ("127.0.0.1", "127.0.0.2"):
            connection = socket.create_connection((host, port), timeout=50)
            connection.sendall(ASK)
            assert status_of(connection) == b"200"


def test_a_socket_unit_decides_the_address(manager: Manager) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        manager.kept = {"cortex.socket": [os.dup(given.fileno())]}
        port = given.getsockname()[1]
    configure(manager.directory, "127.0.0.1:1")
    with manager.running():
        connection = connected(port)
        connection.sendall(ASK)
        assert status_of(connection) == b"200"


def test_a_new_socket_unit_ends_the_sockets_of_before(manager: Manager) -> None:
    """A client of the old port is refused; otherwise it would wait in a queue that no process reads."""
    with socket.create_server(("127.0.0.1", 0)) as given, socket.create_server(("127.0.0.1", 0)) as old:
        manager.kept = {"cortex.socket": [os.dup(given.fileno())], KEPT: [os.dup(old.fileno())]}
        port = old.getsockname()[1]
    configure(manager.directory, "127.0.0.1:1")
    with manager.running():
        assert list(manager.kept) == ["cortex.socket"]
        with pytest.raises(ConnectionRefusedError):
            connected(port)


def test_systemd_keeps_the_sockets_of_many_workers(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one message can carry."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.directory / "notify"))
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as sock:
        keep_sockets(KEPT, [stack.enter_context(sock.dup()) for _ in range(256)])
        notify_ready()
        manager.until("READY=1")
    assert len(manager.kept[KEPT]) == 256
