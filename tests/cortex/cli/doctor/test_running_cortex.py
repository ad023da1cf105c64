"""What doctor says of a cortex that answers badly, of another program at its address, and of a stopped cortex."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import PairFiles, authority_file, pair
from tests.cortex.cli.doctor.doctor_command import config_file, doctor, doctor_process
from tests.ports import free_port
from tests.processes import eventually
from tests.services import Service

HEALTH = {"status": "ok", "nodes": {"healthy": 1, "total": 1}}
FLEET = {"nodes": [{"name": "n", "models": [{"id": "m", "status": "loaded"}]}]}
COMPLETION: dict[str, Any] = {"choices": [{}]}


class Program(ThreadingHTTPServer):
    """Answers each path with its status and body. `/v1/chat/completions` sets `asked` and waits for `release`."""

    daemon_threads = True

    def __init__(self, answers: Mapping[str, tuple[int, Any]], tls: PairFiles | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.asked, self.release = threading.Event(), threading.Event()
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.cert, tls.key)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not trust the certificate."""


class _Handler(BaseHTTPRequestHandler):
    server: Program

    def do_GET(self) -> None:
        status, body = self.server.answers[self.path]
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        self.server.asked.set()
        self.server.release.wait()
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Not to the output of the tests."""


@contextlib.contextmanager
def running(answers: Mapping[str, tuple[int, Any]], tls: PairFiles | None = None) -> Iterator[Program]:
    with Program(answers, tls) as program:
        thread = threading.Thread(target=program.serve_forever)
        thread.start()
        try:
            yield program
        finally:
            program.release.set()
            program.shutdown()
            thread.join()


def gateway(address: str, **keys: Any) -> dict[str, Any]:
    return {"listen": address, "metrics_listen": "127.0.0.1:0", **keys}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (421, {"error": {"message": "wrong host"}}, "cortex: wrong host"),
        (
            404,
            "<!doctype html><title>x</title><style>p {color: red}</style><h1>Not Found</h1>\n<p>&copy; nginx</p>",
            "cortex: {url} answers, but not like a cortex: HTTP 404: Not Found © nginx; end that program, or change",
        ),
        (200, "<html>", "cortex: {url} does not answer like a cortex, check --url"),
        (200, [], "cortex: {url} answers, but not like a cortex; end that program, or change [gateway] listen"),
        (503, {**HEALTH, "nodes": {"healthy": 0, "total": 1}}, "cortex: {url} answers; it reaches 0 of 1 neurons; see"),
    ],
)
def test_a_program_that_answers_is_not_called_stopped(tmp_path: Path, status: int, body: Any, said: str) -> None:
    """Its port is not checked: the advice would be to end it."""
    with running({"/health": (status, body), "/fleet": (200, {})}) as program:
        report = doctor(config_file(tmp_path, gateway=gateway(program.address)))
    (line,) = report.of("fault")
    assert line.startswith(said.format(url=f"http://{program.address}"))
    assert not any("does not run" in line or "listen:" in line for line in report.of("warning") + report.of("ok"))


def test_a_cortex_without_a_healthy_neuron(tmp_path: Path) -> None:
    """It answers 503, and runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    neurons = [{"name": "gone", "endpoint": "http://127.0.0.1:1"}]
    config = config_file(tmp_path, neurons=neurons, gateway=gateway(f"127.0.0.1:{port}"))
    cortex = Service(tmp_path, "cortex", config, url)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return cortex.request("/health").status == 503
        return False

    try:
        eventually(answers, "cortex answers", within_secs=30)
        report = doctor(config)
    finally:
        cortex.stop()
    assert any(line.startswith(f"cortex: {url} answers; it reaches 0 of 1") for line in report.of("fault"))
    assert any(line.startswith("cortex: it does not reach gone") for line in report.of("fault"))


@pytest.mark.parametrize(
    ("name", "trusted", "said"),
    [
        ("127.0.0.1", False, "set CORTEX_CA to a PEM file"),
        ("cortex.example", True, "set --url to an address with a name that is in the certificate"),
    ],
)
def test_a_certificate_that_is_not_trusted(tmp_path: Path, name: str, trusted: bool, said: str) -> None:
    """As that of any cortex with a public name, asked at its loopback address."""
    files = pair(tmp_path, name)
    prefix = ("env", f"CORTEX_CA={authority_file(tmp_path)}") if trusted else ()
    with running({"/health": (200, HEALTH)}, files) as program:
        report = doctor(config_file(tmp_path, gateway=gateway(program.address, **files.gateway)), prefix=prefix)
    (line,) = report.of("fault")
    assert line.startswith(f"cortex: https://{program.address}: the TLS certificate is not trusted: ")
    assert said in line


def test_an_address_elsewhere_says_nothing_of_the_ports_here(tmp_path: Path) -> None:
    """The program that has the port may be a healthy cortex."""
    with running({}) as program:
        config = config_file(tmp_path, gateway=gateway(program.address))
        report = doctor(config, "--url", f"http://127.0.0.1:{free_port()}")
    assert report.of("fault") == []
    assert any(line.startswith("cortex: does not run: ") for line in report.of("warning"))


def test_the_file_counts_more_than_the_environment(tmp_path: Path) -> None:
    """CORTEX_URL may name another cortex than the one whose file is checked."""
    with running({"/health": (421, {"error": {"message": "wrong host"}})}) as program:
        config = config_file(tmp_path, gateway=gateway(program.address))
        report = doctor(config, prefix=("env", "CORTEX_URL=http://127.0.0.1:1"))
    assert report.of("fault") == ["cortex: wrong host"]


def test_lines_come_before_the_completion(tmp_path: Path) -> None:
    """It may load a model first, which takes long; a line says which one is asked."""
    answers = {"/health": (200, HEALTH), "/fleet": (200, FLEET), "/v1/chat/completions": (200, COMPLETION)}
    with running(answers) as program:
        config = config_file(tmp_path, gateway=gateway(program.address))
        with doctor_process(config, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            assert program.asked.wait(50), "no completion was asked for"
            written = os.read(process.stdout.fileno(), 1 << 16).decode()
            program.release.set()
            rest = process.stdout.read().decode()
    assert f"ok       cortex: http://{program.address} answers" in written
    assert written.endswith("asking m for an answer, which loads it if necessary ...\n")
    assert rest.startswith("ok       completion: m answers after ")


@pytest.mark.parametrize(
    ("address", "prefix", "said"),
    [
        ("192.0.2.1:1", (), "Cannot assign requested address; change [gateway] metrics_listen"),
        (
            "127.0.0.1:1",
            ("setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service"),
            "Permission denied; let this user use ports below 1024",
        ),
    ],
)
def test_an_address_that_cannot_be_listened_on(
    tmp_path: Path, address: str, prefix: tuple[str, ...], said: str
) -> None:
    """No program uses it, so the advice is another."""
    if prefix and (os.getuid() or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text("ascii")) < 2):
        pytest.skip("needs root, whose right is taken, and ports that need it")
    config = config_file(tmp_path, gateway={"listen": "127.0.0.1:0", "metrics_listen": address})
    (line,) = doctor(config, prefix=prefix).of("fault")
    assert line.startswith(f"metrics_listen: cannot listen on {address}: {said}")
