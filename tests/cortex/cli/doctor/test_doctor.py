"""Each fault is found, named and explained; a healthy deployment has none."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cortex.cli.doctor.findings import Verdict
from cortex.cli.doctor.found import of_fleet
from cortex.cli.doctor.neurons import NeuronAnswers, check_harnesses, check_twins, examine
from cortex.cli.doctor.this_host import DeploymentFiles
from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from shared import __version__
from shared.protocol import Device, DeviceHealth, Discovery, ModelView, NeuronHealth
from tests.cortex.cli.doctor.doctor_command import CATALOGUE, NEURON, TOP, command, config_file, doctor
from tests.ports import free_port
from tests.processes import eventually
from tests.services import NODE, TOKEN, Fleet, Service, running_fleet


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def fleet(directory: Path) -> Iterator[Fleet]:
    """A healthy deployment."""
    cortex = {"state_dir": str(directory / "cortex"), "poll": {"interval_secs": 0.2}}
    with running_fleet(directory, NEURON, cortex, CATALOGUE) as fleet:
        eventually(lambda: fleet.cortex.request("/health").body["nodes"]["healthy"] == 1, "healthy", within_secs=30)
        yield fleet


def test_a_healthy_deployment(fleet: Fleet, directory: Path) -> None:
    """Everything is checked, down to an answer of a model; nothing is changed."""
    report = doctor(directory / "cortex.toml", "--model", "m")
    assert report.status == 0, report.findings
    assert report.of("fault") == report.of("warning") == []
    told = report.of("ok")
    for begin in (
        f"configuration: {directory}/cortex.toml and {directory}/models.toml can be read: neurons 1, models 1",
        f"state directory: {directory}/cortex can be written, ",
        f"database: {directory}/cortex/cortex.db can be read",
        f"{NODE}: answers in ",
        f"cortex: {fleet.cortex.url} answers; it reaches 1 of 1 neurons",
        "completion: m answers after ",
    ):
        assert any(line.startswith(begin) for line in told), (begin, told)
    assert f"{__version__}, " in "\n".join(told)
    assert "RTX 4090" in "\n".join(told)
    assert [path for path in (directory / "cortex").iterdir() if path.name.startswith("tmp")] == []


def test_a_loaded_model_is_asked_by_default(fleet: Fleet, directory: Path) -> None:
    assert fleet.cortex.request("/fleet/load", {"model": "m"}).status == 200
    assert any(line.startswith("completion: m answers") for line in doctor(directory / "cortex.toml").of("ok"))


def test_lines_for_people(fleet: Fleet, directory: Path) -> None:
    """One for each finding, with what to do, and a sum."""
    ended = command(directory / "cortex.toml", "--model", "absent")
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("ok       configuration: ")
    (wrong,) = [line for line in lines if line.startswith("fault    ")]
    assert "completion: absent: " in wrong
    assert "`cortex explain absent`" in wrong
    assert lines[-1] == f"1 fault, 0 warnings, {len(lines) - 3} ok"


def test_neurons_that_dns_finds(fleet: Fleet, tmp_path: Path) -> None:
    """Under their own names, also while cortex does not run; their harnesses count."""
    port = int(fleet.neuron.url.rpartition(":")[2])
    table = {"kind": "dns", "host": "127.0.0.1", "port": port, "token_env": "NEURON_TOKEN"}
    report = doctor(config_file(tmp_path, discovery=table))
    assert report.of("fault") == []
    assert any(line.startswith(f"{NODE}: answers in ") for line in report.of("ok"))
    assert "discovery: 127.0.0.1 has the addresses 127.0.0.1" in report.of("ok")
    table["host"] = "no.invalid"
    found = doctor(config_file(tmp_path, discovery=table)).of("warning")
    assert any(line.startswith("discovery: no.invalid has no address; set [discovery] host") for line in found)


def test_neurons_that_have_registered(fleet: Fleet, tmp_path: Path) -> None:
    """With the tokens in the state file."""
    kept = {"name": "gpu1", "endpoint": fleet.neuron.url, "token": TOKEN, "expires_at": 4e9}
    (tmp_path / "state").mkdir()
    state = {"version": 1, "registrations": [kept]}
    (tmp_path / "state" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (tmp_path / "token").write_text("registration", encoding="utf-8")
    table = {"kind": "register", "registration_token_file": "token"}
    report = doctor(config_file(tmp_path, discovery=table))
    assert report.of("fault") == []
    assert any(line.startswith("gpu1: answers in ") for line in report.of("ok"))
    assert any(line.startswith("discovery: cortex cannot be asked") for line in report.of("warning"))


def test_neurons_that_the_running_cortex_has_found(fleet: Fleet, tmp_path: Path) -> None:
    """Without a token for it a registered neuron is not examined; that is a warning."""
    (tmp_path / "token").write_text("registration", encoding="utf-8")
    table = {"kind": "register", "registration_token_file": "token"}
    report = doctor(config_file(tmp_path, discovery=table), "--url", fleet.cortex.url)
    assert any(line.startswith(f"{NODE}: it answers, but its token is known") for line in report.of("warning"))
    assert report.of("fault") == []


def test_found_neurons_of_a_fleet(tmp_path: Path) -> None:
    """Listed ones are left out; one that cannot be reached from here is not asked."""
    listed = [{"name": "a", "endpoint": "http://a:1"}]
    discovery = {"kind": "dns", "host": "n", "token": "t"}
    config = CortexConfig.model_validate({"neurons": listed, "discovery": discovery})
    nodes: list[dict[str, object]] = [{"name": name, "endpoint": f"http://{name}:1"} for name in "ab"]
    nodes += [{"name": name, "endpoint": f"dial://{name}", "healthy": name == "c"} for name in "cd"]
    asked, findings = of_fleet({"nodes": nodes}, DeploymentFiles(tmp_path, config, Catalogue()), {})
    assert [(each.entry.name, each.entry.token) for each in asked] == [("b", "t")]
    assert [(each.verdict, each.subject) for each in findings] == [(Verdict.OK, "c"), (Verdict.WARNING, "d")]


def test_a_wrong_token(fleet: Fleet, tmp_path: Path) -> None:
    report = doctor(config_file(tmp_path, fleet), token="another")
    assert report.status == 1
    (line,) = report.of("fault")
    assert line.startswith(f"{NODE}: it refuses the token: token or token_env in cortex.toml (")


def test_no_token(fleet: Fleet, tmp_path: Path) -> None:
    neurons = [{"name": NODE, "endpoint": fleet.neuron.url}]
    (line,) = doctor(config_file(tmp_path, neurons=neurons)).of("fault")
    assert line.startswith(f"{NODE}: it needs a token")


def test_a_variable_that_is_not_set(fleet: Fleet, tmp_path: Path) -> None:
    """As for someone who runs doctor in a shell without the service's environment."""
    report = doctor(config_file(tmp_path, fleet), token=None)
    (line,) = report.of("fault")
    assert "the environment variable NEURON_TOKEN is not set" in line
    assert "EnvironmentFile=" in line
    assert report.of("ok") == []


def test_a_dead_neuron(tmp_path: Path) -> None:
    """And a cortex that does not run, whose ports are free."""
    neurons = [{"name": "gone", "endpoint": "http://127.0.0.1:1"}, {"name": "lost", "endpoint": "http://no.invalid:2"}]
    report = doctor(config_file(tmp_path, neurons=neurons), "--model", "m")
    gone, lost, completion = report.of("fault")
    assert gone.startswith("gone: http://127.0.0.1:1: ")
    assert "connection refused: nothing listens on 127.0.0.1:1; is neuron running there" in gone
    assert "'no.invalid' cannot be resolved" in lost
    assert completion == "completion: m cannot be asked: cortex does not run"
    assert [line.partition(":")[0] for line in report.of("warning")] == ["cortex"]
    assert any(line.startswith("listen: ") for line in report.of("ok"))


def test_a_port_that_another_program_has(fleet: Fleet, tmp_path: Path) -> None:
    """The neuron's, which does not answer like a cortex."""
    address = fleet.neuron.url.removeprefix("http://")
    gateway = {"listen": "127.0.0.1:0", "metrics_listen": address}
    (line,) = doctor(config_file(tmp_path, fleet, gateway=gateway)).of("fault")
    assert line.startswith(f"metrics_listen: cannot listen on {address}: Address already in use; end the program")


def test_a_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """Also for root."""
    (tmp_path / "file").touch()
    report = doctor(config_file(tmp_path, state_dir=str(tmp_path / "file" / "state")))
    assert any(line.startswith("state directory: ") and "another state_dir" in line for line in report.of("fault"))


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        ("-o ro,size=1m", "Read-only file system; give cortex's user"),
        ("-o size=16k", "No space left on device; make room"),
    ],
)
def test_a_full_or_read_only_disk(tmp_path: Path, mount: str, said: str) -> None:
    """A real one, in a mount namespace of its own."""
    script = f'mount -t tmpfs {mount} tmpfs "$0" && exec "$@"'
    state = tmp_path / "state"
    state.mkdir()
    prefix = ("unshare", "--mount", "sh", "-c", script, str(state))
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    report = doctor(config_file(tmp_path), prefix=prefix)
    assert report.status == 1
    assert any(line.startswith(f"state directory: {state} cannot be written: {said}") for line in report.of("fault"))


def test_a_database_that_does_not_answer(tmp_path: Path) -> None:
    """The password is not shown."""
    report = doctor(config_file(tmp_path, database="postgresql://cortex:secret@127.0.0.1:1/cortex"))
    (line,) = [line for line in report.of("fault") if line.startswith("database: ")]
    assert "postgresql://cortex@127.0.0.1:1/cortex" in line
    assert "is it running" in line
    assert "secret" not in json.dumps(report.findings)


def test_a_database_that_answers(tmp_path: Path, new_postgresql: Callable[[], str]) -> None:
    """An empty one is left as it is: cortex makes the tables when it starts."""
    config = config_file(tmp_path, database=new_postgresql())
    for _ in range(2):
        (line,) = [line for line in doctor(config).of("ok") if line.startswith("database: ")]
        assert line.endswith(" is empty; its tables are made when cortex starts")


def test_a_broken_database(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "cortex.db").write_bytes(b"no database" * 1000)
    (line,) = [line for line in doctor(config_file(tmp_path)).of("fault") if line.startswith("database: ")]
    assert "file is not a database" in line


def test_a_wrong_file(tmp_path: Path) -> None:
    """Every problem is a line; nothing else is checked."""
    config = config_file(tmp_path, gateway={"listen": "nowhere"}, polling={})
    report = doctor(config)
    assert len(report.findings) == len(report.of("fault")) == 2
    assert any("gateway.listen = 'nowhere': must be HOST:PORT" in line for line in report.of("fault"))


def test_a_skewed_clock(tmp_path: Path) -> None:
    """A neuron whose process has a clock that is an hour behind."""
    site = tmp_path / "site"
    site.mkdir()
    code = "import time\nreal = time.time\ntime.time = lambda: real() - 3600\n"
    (site / "sitecustomize.py").write_text(code, encoding="utf-8")
    with neuron_alone(tmp_path, {"PYTHONPATH": f"{site}:{TOP}"}) as url:
        report = doctor(config_file(tmp_path, neurons=[{"name": NODE, "endpoint": url, "token": TOKEN}]))
    (line,) = [line for line in report.of("warning") if line.startswith(NODE)]
    assert line.startswith(f"{NODE}: its clock is 3600 s behind this host's; run a time service")


@contextlib.contextmanager
def neuron_alone(directory: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The URL of a neuron with this environment too, inside the body."""
    port, config = free_port(), directory / "neuron.toml"
    table = {"name": NODE, "port": port, "token_env": "NEURON_TOKEN", "state_dir": str(directory / "n"), **NEURON}
    config.write_text(tomli_w.dumps(table), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        service = Service(directory, "neuron", config, f"http://127.0.0.1:{port}")
    try:
        eventually(service.answers, "neuron answers", within_secs=30)
        yield service.url
    finally:
        code = service.stop()
    assert code == 0


def answers(
    name: str = "n", *, skew: float = 0.0, models: Any = (), health: Any = (), **discovery: Any
) -> NeuronAnswers:
    told = Discovery(**{"version": __version__, "instance_id": name, "devices": [Device(index=0)], **discovery})
    return NeuronAnswers(name, told, NeuronHealth(devices=list(health)), models, skew, 0.001)


@pytest.mark.parametrize(
    ("told", "verdict", "said"),
    [
        (answers(), Verdict.OK, "answers in 1 ms"),
        (answers(version="0.0.1"), Verdict.WARNING, "neuron is 0.0.1, this cortex is"),
        (answers(skew=4.9), Verdict.OK, "answers"),
        (answers(skew=-6), Verdict.WARNING, "its clock is 6 s behind"),
        (answers(devices=[], cuda_unavailable_reason="no driver"), Verdict.FAULT, "no GPU can be used: no driver"),
        (answers(devices=[]), Verdict.WARNING, "it has no GPU"),
        (answers(devices=[Device(index=1, lost="Xid 79")]), Verdict.FAULT, "GPU 1 is lost: Xid 79"),
        (answers(health=[DeviceHealth(index=0, fault="Xid 48")]), Verdict.FAULT, "GPU 0: Xid 48"),
        (answers(health=[DeviceHealth(index=0, warnings=["too hot"])]), Verdict.WARNING, "GPU 0: too hot"),
        (answers(models=[ModelView(id="m", status="failed", error="out of memory")]), Verdict.WARNING, "m failed: out"),
    ],
)
def test_what_a_neuron_tells(told: NeuronAnswers, verdict: Verdict, said: str) -> None:
    """The worst finding comes last."""
    found = examine(told)[-1]
    assert found.verdict is verdict
    assert found.text.startswith(said)


def test_one_neuron_under_two_names() -> None:
    (found,) = check_twins([answers("a", instance_id="x"), answers("b", instance_id="x"), answers("c")])
    assert (found.verdict, found.subject) == (Verdict.FAULT, "a and b")


def test_a_harness_that_no_neuron_has() -> None:
    models = [
        {"id": "one", "harness": "llama"},
        {"id": "two", "harness": "vllm"},
        {"id": "lora", "base": "two", "lora": "o/l"},
    ]
    catalogue = Catalogue.model_validate({"models": models})
    (found,) = check_harnesses([answers(harnesses=["vllm"])], catalogue)
    assert found.text == "no neuron has the harness llama, for one"
    assert check_harnesses([], catalogue) == []


def test_an_engine_that_cannot_be_reached(tmp_path: Path) -> None:
    """The neuron answers, but its engine's port does not, as behind a firewall."""
    code = textwrap.dedent("""
        import http.server, json, sys
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                view = {"id": "m", "status": "loaded", "devices": [0], "endpoint": {"url": "http://127.0.0.1:1"}}
                body = {"/discovery": {"devices": []}, "/health": {"devices": []}, "/models": [view]}[self.path]
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            def log_message(self, *args): pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        print(server.server_port, flush=True)
        server.serve_forever()
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            neurons = [{"name": "n", "endpoint": f"http://127.0.0.1:{port}"}]
            report = doctor(config_file(tmp_path, neurons=neurons))
        finally:
            process.kill()
    (line,) = report.of("fault")
    assert line.startswith("n: the engine of m at http://127.0.0.1:1 cannot be reached: ")
    assert "port_range" in line
