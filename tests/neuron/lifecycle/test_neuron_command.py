"""The `neuron` command as a real process: start, stop, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neuron.engine.state_dir import StateDir
from shared.serve import bind
from tests.neuron.neurons import (
    REPOSITORY,
    TIMEOUT_SECS,
    listening_socket,
    marked_processes,
    neuron_process,
    toml_config,
    until,
)

MODEL = "org/model"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m neuron ...` until it exits by itself."""
    return subprocess.run(
        [sys.executable, "-m", "neuron", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signal_stops_engines(mark: str, tmp_path: Path, number: int) -> None:
    """SIGTERM and SIGINT: exit 0, no engine left, the default state directory gone."""
    config = toml_config(tmp_path, 'name = "one"', "port = 0")
    async with neuron_process(config, env={"TMPDIR": str(tmp_path)}) as neuron:
        assert (await neuron.load(MODEL, "--fault", "spawn-child")).status == 200
        port = neuron.base.rpartition(":")[2]
        state = tmp_path / f"neuron-{os.getuid()}-{port}"
        assert state.is_dir()
        assert await neuron.stop(number) == 0
    assert not marked_processes(mark)
    assert not state.exists()
    assert "neuron one listening on http://127.0.0.1:" in neuron.log.read_text()


async def test_request_in_an_engine_is_finished_first(mark: str, tmp_path: Path) -> None:
    """SIGTERM while an engine answers: the answer is complete, then everything stops."""
    config = toml_config(tmp_path, "port = 0", f'state_dir = "{tmp_path}/state"')
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        found = (await neuron.endpoint(MODEL)).body
        body = {"model": MODEL, "prompt": "x", "max_tokens": 30}
        headers = {"Authorization": f"Bearer {found['api_key']}"}
        async with neuron.session.post(
            f"{found['url']}/v1/completions", json={**body, "stream": True}, headers=headers
        ) as answer:
            await answer.content.readline()
            neuron.process.terminate()
            text = (await answer.read()).decode()
        assert '"finish_reason": "length"' in text or '"finish_reason":"length"' in text
        assert text.rstrip().endswith("data: [DONE]")
        assert await asyncio.wait_for(neuron.process.wait(), TIMEOUT_SECS) == 0


async def test_second_signal_exits_at_once(mark: str, tmp_path: Path) -> None:
    """The second signal: neuron does not wait, and kills the engines before it exits."""
    config = toml_config(tmp_path, "port = 0", f'state_dir = "{tmp_path}/state"')
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--fault", "ignore-sigterm", "--fault", "spawn-child")
        neuron.process.terminate()
        await until(lambda: "stopping" in neuron.log.read_text())
        assert await neuron.stop() == 130
    await until(lambda: not marked_processes(mark))


async def test_inherited_socket_and_lifeline(mark: str, tmp_path: Path) -> None:
    """A parent passes a bound socket; neuron and its engines stop when the parent's pipe closes."""
    config = toml_config(tmp_path, f'state_dir = "{tmp_path}/state"')
    sock = bind("127.0.0.1", 0)
    reading, writing = os.pipe()
    try:
        fds = (sock.fileno(), reading)
        async with neuron_process(config, "--fd", str(fds[0]), "--lifeline-fd", str(reading), pass_fds=fds) as neuron:
            assert neuron.base.endswith(f":{sock.getsockname()[1]}")
            await neuron.load(MODEL)
            os.close(writing)
            writing = -1
            assert await asyncio.wait_for(neuron.process.wait(), TIMEOUT_SECS) == 0
    finally:
        sock.close()
        for descriptor in (reading, writing):
            if descriptor >= 0:
                os.close(descriptor)
    assert not marked_processes(mark)


def test_wrong_configuration(tmp_path: Path) -> None:
    """EX_CONFIG; each problem on standard error with file, key and value."""
    path = tmp_path / "neuron.toml"
    path.write_text(
        'prot = 1\n[harness.vllm]\nextra_args = ["--port", "1"]\n[[default_models]]\nmodel_id = "x"\nquantt = 1\n'
    )
    done = run("serve", "--config", str(path))
    assert done.returncode == os.EX_CONFIG
    for words in (f"{path}: prot: unknown key", "--port is set by neuron", "quantt: unknown key"):
        assert words in done.stderr


def test_default_models_and_simulated_devices_are_checked_before_the_start(tmp_path: Path) -> None:
    """A problem that would only show at a load is found at start, and named with the file."""
    path = tmp_path / "neuron.toml"
    path.write_text(
        '[[default_models]]\nmodel_id = "-bad"\n[[default_models]]\nmodel_id = "m"\nargs = ["--port", "1"]\n'
        '[simulate]\ndevices = ["RTX 9999", { index = 5, name = "L4" }]\n'
    )
    done = run("serve", "--config", str(path))
    assert done.returncode == os.EX_CONFIG
    for words in ("default_models[0].model_id: '-bad'", "default_models[1].args", "'RTX 9999'", "devices[1].index = 5"):
        assert words in done.stderr
    assert all(line.removeprefix("neuron: ").startswith(str(path)) for line in done.stderr.splitlines())


def test_port_that_is_taken(tmp_path: Path) -> None:
    """neuron exits with status 1 and names the address."""
    with listening_socket() as port:
        done = run("serve", NEURON_PORT=str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr


def test_state_directory_of_another_neuron(tmp_path: Path) -> None:
    """Two neurons in one directory would remove each other's engines."""
    with StateDir(tmp_path / "state").held(remove_after=False):
        done = run("serve", NEURON_PORT="0", NEURON_STATE_DIR=str(tmp_path / "state"))
    assert done.returncode == 1
    assert "in use by another neuron" in done.stderr


def test_usage_and_version() -> None:
    """Exit status 2 for an unknown command; the version is the package's."""
    assert run("dance").returncode == 2
    assert run("--version").stdout.startswith("neuron ")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_the_network_is_not_served_without_a_token(tmp_path: Path, host: str) -> None:
    """Anyone who reached the port could run code. The message names both ways out, and nothing is left behind."""
    config = toml_config(tmp_path, "port = 0", f'host = "{host}"')
    done = run("serve", "--config", str(config), TMPDIR=str(tmp_path))
    assert done.returncode == os.EX_CONFIG
    assert "token_env" in done.stderr
    assert "allow_anonymous = true" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("neuron-*")) == []


def test_an_inherited_socket_of_the_network_needs_a_token_too(tmp_path: Path) -> None:
    """The socket counts, not the configured host."""
    config = toml_config(tmp_path, "port = 0")
    with bind("0.0.0.0", 0) as sock:
        sock.set_inheritable(True)
        done = subprocess.run(
            [sys.executable, "-m", "neuron", "serve", "--config", str(config), "--fd", str(sock.fileno())],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            pass_fds=(sock.fileno(),),
        )
    assert done.returncode == os.EX_CONFIG
    assert "allow_anonymous" in done.stderr


@pytest.mark.parametrize("lines", [['token = "secret"'], ["allow_anonymous = true"]], ids=str)
async def test_the_network_is_served_with_a_token_or_by_choice(mark: str, tmp_path: Path, lines: list[str]) -> None:
    config = toml_config(tmp_path, "port = 0", 'host = "0.0.0.0"', f'state_dir = "{tmp_path}/state"', *lines)
    async with neuron_process(config) as neuron:
        base = neuron.base.replace("0.0.0.0", "127.0.0.1")
        async with neuron.session.get(f"{base}/health", headers={"Authorization": "Bearer secret"}) as response:
            assert response.status == 200
